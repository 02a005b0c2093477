"""The benchmark of replication: what its table says of its rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks lie in the repository alone", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from benchmarks import replication  # noqa: E402

CHANGE = {"mean": -0.01234, "low": -0.02, "high": 0.001}


def row(name: str, **text: Any) -> dict[str, Any]:
    losses = {"nll": 2.5, "kl": 0.04, **text}
    return {"row": name, "note": "", "bytes": 1000, "read": 1200, "compute": 1.125, "texts": {"unseen.txt": losses}}


def test_the_table_has_a_line_a_row() -> None:
    told = {
        "model": "tiny",
        "type": "Q2_K",
        "rows": [
            row("T"),
            row("R", nll_change=CHANGE, kl_change=CHANGE),
            {"row": "M-bytes", "note": "2052 bytes buy nothing that helps", "texts": {}},
        ],
        "copy": ["1:serial:1:block"],
        "replicate": "none: it promises little",
        "fitted_on": 65536,
        "steps": 40,
        "predictions": {"unseen.txt": 33726},
    }
    lines = replication.table(told).splitlines()
    assert "40 steps on 65536 tokens" in lines[0]
    assert "1:serial:1:block" in lines[0]
    assert "none: it promises little" in lines[0]
    assert lines[4] == "| T |  | 1000 | 1200 | 1.125 | 2.5000 | 0.0400 |"
    assert lines[5].endswith("| 2.5000, -12.340 (-20.000 to +1.000) | 0.0400, -12.340 (-20.000 to +1.000) |")
    assert "buy nothing" in lines[6]
    assert len({line.count("|") for line in lines[2:]}) == 1
