"""`rondel quantize --compare`: one table on standard output or one JSON object, and no folder unless asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.program import rondel
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    made = tiny_model("llama", folder / "tiny", width=256, hidden=256, layers=1)
    (folder / "text.txt").write_text("once on a time there was the water " * 60, encoding="utf-8")
    text = folder / "text.txt"
    done = rondel("calibrate", made, "--text", text, "-o", folder / "calib", "-q", "--context", 32, "--tokens", 512)
    assert (done.code, done.stderr) == (0, "")
    return made


def test_a_table_and_an_object(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("quantize", model, "--stats", model.parent / "calib", "--type", "Q4_0", "--pure", "--compare")
    done = rondel(*asked, "--methods", "rtn,imatrix,awq", "-t", 1)
    assert done.code == 0
    head, *rows = done.stdout.split("\n\n")[0].splitlines()
    assert head.split("  ")[0] == "method"
    assert "mean KL" in head
    assert [row.split()[0] for row in rows] == ["rtn", "imatrix", "awq+imatrix"]
    assert "windows of 32 tokens held out" in done.stdout
    assert "output error by role" in done.stdout
    done = rondel(*asked, "--methods", "rtn", "--granularity", "tensor", "--json", "-o", "kept")
    (row,) = json.loads(done.stdout)["methods"]
    assert row["method"] == "rtn"
    assert 0 < row["error"] < 1
    assert row["mean_kl"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]  # and the first comparison left nothing


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "give -o DIR"),
        (("--methods", "rtn", "-o", "out"), 2, "what to --compare"),
        (("--compare", "--method", "rtn"), 2, "neither --method"),
        (("--compare", "--dry-run"), 2, "nor --dry-run"),
        (("--compare", "--methods", "awq"), 1, "needs statistics"),
        (("--method", "rtn", "--granularity", "channel", "--type", "Q2_K", "-o", "out"), 1, "--granularity channel"),
        (("--method", "imatrix", "--alpha", "0.5", "-o", "out"), 1, "imatrix rescales nothing"),
    ],
)
def test_usage(model: Path, options: tuple[str, ...], code: int, message: str) -> None:
    done = rondel("quantize", model, *options)
    assert done.code == code
    assert message in " ".join(done.stderr.replace("│", " ").split())
