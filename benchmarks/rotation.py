"""Does rotating pay? Every kind of rotation beside scales and the model as it is, judged by llama.cpp.

For each type and each method of rounding: mean KL divergence from the float model on a text that calibration did not
see. A rotated head has a matrix of its own, so its files are larger where the model ties it: bytes stand beside.

    python benchmarks/rotation.py --model MODEL --types Q2_K --methods gptq --ways none,hadamard --windows 4
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the peer, which the tests own

from benchmarks.case import Bench, digest, kept, rondel  # noqa: E402
from benchmarks.command import SHARED, add_options, cases, publish  # noqa: E402

WAYS = ("none", "scale", "hadamard", "dfrot", "optrot")
METHODS = ("imatrix", "gptq")
TYPES = ("Q2_K", "IQ2_XXS", "Q3_K", "Q4_K")


class RotationBench(Bench):
    """One model and one text; files are made once and kept."""

    def rotated(self, kind: str) -> Path:
        """The folder of the rotated model, with its statistics inside."""
        out = self.folder / f"rotated-{kind}"

        def make() -> dict[str, Any]:
            options = (
                "--stats",
                self.calibration,
                "--rotate",
                "always",
                "--kind",
                kind,
                "--threads",
                str(self.threads),
            )
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--types", default=",".join(TYPES), help="llama.cpp's types, by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="of rounding, by commas")
    parser.add_argument("--ways", default=",".join(WAYS), help="none, scale, and kinds of rotate, by commas")
    add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Run what the options ask for."""
    options = _options()
    prose = SHARED / "models/prose-7m"
    models = [prose if prose.is_dir() else ROOT / "tests/models/stories-4m"]
    wanted = [
        (way, method, type_)
        for type_ in options.types.split(",")
        for method in options.methods.split(",")
        for way in options.ways.split(",")
    ]
    told = []
    for case in cases(options, models):
        bench = RotationBench(case, options.work, limit=options.windows, threads=options.threads)
        bench.prepare()
        rows = [bench.cell(*cell) for cell in wanted]
        facts = {"model": case.model.name, "evaluation": case.evaluation.name, "context": bench.context}
        told.append(facts | {"windows": len(bench.windows), "rows": rows})
    publish(options, "rotation", told, table)


if __name__ == "__main__":
    main()
