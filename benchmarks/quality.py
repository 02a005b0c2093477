"""The judged comparison: rondel's files and llama-quantize's, both measured by llama.cpp against the float model.

For each model: `rondel calibrate` on one text; the float GGUF; for each type llama.cpp's own quantizer with the imatrix
file that calibrate wrote, and `rondel quantize`; then perplexity and KL divergence by llama.cpp's protocol on a text
that calibration did not see. Everything made on the way is kept in a work folder: a second call makes what changed.

    python benchmarks/quality.py --model MODEL --types Q2_K,IQ2_XXS --methods imatrix,gptq --windows 8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the peer, which the tests own

from benchmarks.case import Bench, Case, Wanted  # noqa: E402
from benchmarks.command import SHARED, add_options, cases, publish  # noqa: E402

TYPES = "Q2_K,Q3_K_S,Q4_K_S,IQ2_XXS,IQ2_S,IQ3_XXS"


def run(bench: Bench, wanted: list[Wanted]) -> dict[str, Any]:
    """Everything about one case; `rows` have llama-quantize's file first, then rondel's with their `kl_ratio`."""
    bench.prepare()
    rows: list[dict[str, Any]] = []
    for type_ in dict.fromkeys(one.type for one in wanted):
        theirs = bench.theirs(type_)
        rows.append(theirs)
        for one in wanted:
            if one.type == type_:
                ours = bench.compared(one)
                rows.append(ours | {"kl_ratio": ours["mean_kl"] / theirs["mean_kl"]})
                excess = ours["tensor_bytes"] - theirs["tensor_bytes"], ours["bytes"] - theirs["bytes"]
                rows[-1]["larger"] = max(excess) > 0
                print(_line(bench.case, rows[-1], excess), file=sys.stderr, flush=True)
    return {
        "model": bench.case.model.name,
        "calibration": bench.case.calibration.name,
        "evaluation": bench.case.evaluation.name,
        "context": bench.context,
        "windows": len(bench.windows),
        "perplexity": bench.of_base["perplexity"],
        "rows": rows,
    }


def _line(case: Case, row: dict[str, Any], excess: tuple[int, int]) -> str:
    bytes_ = f"tensors {excess[0]:+d} B, file {excess[1]:+d} B"
    name = f"{case.model.name} {case.evaluation.name} {row['type']} {row['by']}"
    return (
        f"{name}: KL {row['mean_kl']:.5f} = {row['kl_ratio']:.3f} of llama-quantize's, {bytes_}, {row['seconds']:.0f} s"
    )


def table(case: dict[str, Any]) -> str:
    """One case in Markdown."""
    lines = [
        f"{case['model']}, calibrated on {case['calibration']}, judged on {case['windows']} windows of "
        f"{case['context']} tokens of {case['evaluation']}; perplexity of the float model {case['perplexity']:.3f}:",
        "",
        "| type | made by | bytes | of tensors | perplexity | mean KL | 99.9 % KL | same top | seconds | KL ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in case["rows"]:
        ratio = f"**{row['kl_ratio']:.2f}**" if "kl_ratio" in row else ""
        lines.append(
            f"| {row['type']} | {row['by']} | {row['bytes']} | {row['tensor_bytes']} | {row['perplexity']:.3f} "
            f"| {row['mean_kl']:.5f} | {row['kl_99_9']:.3f} | {100 * row['same_top']:.2f} % | {row['seconds']:.1f} "
            f"| {ratio} |"
        )
    return "\n".join(lines) + "\n"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--types", default=TYPES, help=f"llama.cpp's types, by commas; default {TYPES}")
    parser.add_argument("--like", default="", help="types whose bytes rondel may allocate as it likes, by commas")
    parser.add_argument("--methods", default="", help="of rondel quantize --method, by commas; default: its own choice")
    parser.add_argument("--arguments", default="", help="more options of rondel quantize, as one string")
    add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Run what the options ask for."""
    options = _options()
    arguments = tuple(options.arguments.split())
    wanted = [
        Wanted(type_, like, method or None, arguments)
        for types, like in ((options.types, False), (options.like, True))
        for type_ in filter(None, types.split(","))
        for method in options.methods.split(",")
    ]
    models = [ROOT / "tests/models/stories-4m", SHARED / "models/prose-7m"]
    benches = [
        Bench(case, options.work, limit=options.windows, threads=options.threads) for case in cases(options, models)
    ]
    publish(options, "quality", [run(bench, wanted) for bench in benches], table)


if __name__ == "__main__":
    main()
