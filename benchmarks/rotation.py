"""Does rotating pay? Every kind of rotation beside scales and the model as it is, judged by llama.cpp.

For each type and each method of rounding: mean KL divergence from the float model on a text that calibration did not
see. A rotated head has a matrix of its own, so its files are larger where the model ties it: bytes stand beside.

    python benchmarks/rotation.py --model MODEL --types Q2_K --methods gptq --ways none,hadamard --windows 4
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the peer, which the tests own

from benchmarks.case import Bench, digest, kept, rondel  # noqa: E402
from benchmarks.quality import SHARED, default_cases  # noqa: E402
from tests.peer.llama import find_library  # noqa: E402

WAYS = ("none", "scale", "hadamard", "dfrot", "optrot")
METHODS = ("imatrix", "gptq")
TYPES = ("Q2_K", "IQ2_XXS", "Q3_K", "Q4_K")
WINDOWS = 16
START, END = "<!-- rotation: written by benchmarks/rotation.py -->\n", "<!-- end of rotation -->\n"


class RotationBench(Bench):
    """One model and one text; files are made once and kept."""

    def rotated(self, kind: str) -> Path:
        """The folder of the rotated model, with its statistics inside."""
        out = self.folder / f"rotated-{kind}"

        def make() -> dict[str, Any]:
            options = ("--stats", self.calibration, "--kind", kind, "--threads", str(self.threads))
            rondel("rotate", self.case.model, *options, "-o", out, "--force")
            return {}

        kept(out, digest(self.weights, self.statistics["key"], self.program, kind), make)
        return out

    def cell(self, way: str, method: str, type_: str) -> dict[str, Any]:
        """One file: its bytes and its divergence."""
        turned = way not in ("none", "scale")
        model, stats = (self.rotated(way),) * 2 if turned else (self.case.model, self.calibration)
        asked = f"awq+{method}" if way == "scale" else method
        out = self.folder / "rotation" / f"{way}-{method}-{type_}"
        file = out.with_name(out.name + ".gguf")

        def make() -> dict[str, Any]:
            options = ("--stats", stats, "--type", type_, "--method", asked, "--threads", str(self.threads))
            rondel("quantize", model, *options, "-o", out, "--force")
            rondel("export", out, "-o", file, "--force")
            return {}

        kept(file, digest(self.weights, self.statistics["key"], self.program, way, asked, type_), make)
        judged = self.judge(file)
        row = {"type": type_, "method": method, "way": way, "bytes": judged["bytes"], "mean_kl": judged["mean_kl"]}
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row


def table(told: dict[str, Any]) -> str:
    """One case in Markdown: a line for each type and method, a column for each way."""
    rows = {(row["type"], row["method"], row["way"]): row for row in told["rows"]}
    ways = list(dict.fromkeys(row["way"] for row in told["rows"]))
    lines = [
        f"{told['model']}, {told['windows']} windows of {told['context']} tokens of {told['evaluation']}; mean KL, and "
        "kB of the file:",
        "",
        f"| type | method | {' | '.join(ways)} |",
        f"|---|---|{'--:|' * len(ways)}",
    ]
    for type_, method in dict.fromkeys((row["type"], row["method"]) for row in told["rows"]):
        cells = [rows[type_, method, way] for way in ways]
        least = min(cell["mean_kl"] for cell in cells)
        texts = [f"{cell['mean_kl']:.5f}, {cell['bytes'] / 1000:.0f}" for cell in cells]
        marked = [f"**{text}**" if cell["mean_kl"] == least else text for cell, text in zip(cells, texts, strict=True)]
        lines.append(f"| {type_} | {method} | {' | '.join(marked)} |")
    return "\n".join(lines) + "\n"


def write_readme(text: str) -> None:
    """Put the tables between the markers in README.md."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    readme.write_text(before + START + text + END + rest.split(END)[1], encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, action="append", help="a Hugging Face folder; may be repeated")
    parser.add_argument("--types", default=",".join(TYPES), help="llama.cpp's types, by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="of rounding, by commas")
    parser.add_argument("--ways", default=",".join(WAYS), help="none, scale, and kinds of rotate, by commas")
    parser.add_argument("--calibration", type=Path, help="a text")
    parser.add_argument("--evaluation", type=Path, action="append", help="a text that calibration did not see; repeat")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"judged, of each text; default {WINDOWS}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=ROOT / "build/quality", help="what is made on the way")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--write-readme", action="store_true", help="put the tables into README.md")
    return parser.parse_args()


def main() -> None:
    """Run what the options ask for."""
    options = _options()
    if find_library() is None:
        raise SystemExit("unmodified llama.cpp is not installed: make install-peer")
    options.work.mkdir(parents=True, exist_ok=True)
    prose = SHARED / "models/prose-7m"
    models = options.model or ([prose] if prose.is_dir() else [ROOT / "tests/models/stories-4m"])
    wanted = [
        (way, method, type_)
        for type_ in options.types.split(",")
        for method in options.methods.split(",")
        for way in options.ways.split(",")
    ]
    told = []
    for case in default_cases(models, options.calibration, options.evaluation or [], options.work):
        bench = RotationBench(case, options.work, limit=options.windows, threads=options.threads)
        bench.prepare()
        rows = [bench.cell(*cell) for cell in wanted]
        facts = {"model": case.model.name, "evaluation": case.evaluation.name, "context": bench.context}
        told.append(facts | {"windows": len(bench.windows), "rows": rows})
    text = "\n".join(map(table, told))
    if options.write_readme:
        write_readme(text)
    print(json.dumps({"cases": told}, indent=1) if options.json else text)


if __name__ == "__main__":
    main()
