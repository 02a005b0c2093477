"""What the quality benchmarks share as programs: their options, the cases to judge, and where the tables go."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.case import ROOT, Case
from tests.peer.llama import find_library

SHARED = ROOT.parent / "shared"
WINDOWS = 16
CALIBRATION_SHARE = 0.75  # of the text in tests/, where there is no other; the rest is judged on


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to judge on, and what becomes of the tables."""
    parser.add_argument("--model", type=Path, action="append", help="a Hugging Face folder; may be repeated")
    parser.add_argument("--calibration", type=Path, help="a text")
    parser.add_argument("--evaluation", type=Path, action="append", help="a text that calibration did not see; repeat")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"judged, of each text; default {WINDOWS}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=ROOT / "build/quality", help="what is made on the way")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--write-readme", action="store_true", help="put the tables into README.md")


def cases(options: argparse.Namespace, models: list[Path]) -> list[Case]:
    """The models asked for, or those of `models` that are here, each with every text to judge it on."""
    if find_library() is None:
        raise SystemExit("unmodified llama.cpp is not installed: make install-peer")
    options.work.mkdir(parents=True, exist_ok=True)
    text, found = SHARED / "text", []
    for model in [model for model in options.model or models if model.is_dir()]:
        if text.is_dir():
            stories = "stories" in model.name
            judged = [text / "stories-a.txt"] if stories else [text / "technical-a.txt", text / "wiki.test.raw"]
            seen = text / "calibration.txt"
        else:
            seen, unseen = _split(ROOT / "tests/models/stories.txt", options.work)
            judged = [unseen]
        found += [Case(model, options.calibration or seen, one) for one in options.evaluation or judged]
    return found


def _split(text: Path, work: Path) -> tuple[Path, Path]:
    """A text cut in two at the end of a line: the first part to calibrate on, the second to judge on."""
    content = text.read_text(encoding="utf-8")
    cut = content.index("\n", int(CALIBRATION_SHARE * len(content))) + 1
    parts = work / f"{text.stem}-calibration.txt", work / f"{text.stem}-evaluation.txt"
    for path, part in zip(parts, (content[:cut], content[cut:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return parts


def markers(name: str) -> tuple[str, str]:
    """The lines of README.md that stand around the tables of a benchmark."""
    return f"<!-- {name}: written by benchmarks/{name}.py -->\n", f"<!-- end of {name} -->\n"


def write_readme(name: str, text: str) -> None:
    """Put tables between their markers in README.md."""
    readme, (start, end) = ROOT / "README.md", markers(name)
    before, rest = readme.read_text(encoding="utf-8").split(start)
    readme.write_text(before + start + text + end + rest.split(end)[1], encoding="utf-8")


def publish(options: argparse.Namespace, name: str, told: list[dict[str, Any]], table: Callable[..., str]) -> None:
    """Print the tables or their facts; put the tables between the markers of that name in README.md if asked to."""
    text = "\n".join(table(case) for case in told)
    if options.write_readme:
        write_readme(name, text)
    print(json.dumps({"cases": told}, indent=1) if options.json else text)
