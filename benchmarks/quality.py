"""The judged comparison: rondel's files and llama-quantize's, both measured by llama.cpp against the float model.

For each model: `rondel calibrate` on one text; the float GGUF; for each type llama.cpp's own quantizer with the imatrix
file that calibrate wrote, and `rondel quantize`; then perplexity and KL divergence by llama.cpp's protocol on a text
that calibration did not see. Everything made on the way is kept in a work folder: a second call makes what changed.

    python benchmarks/quality.py --model MODEL --types Q2_K,IQ2_XXS --methods imatrix,gptq --windows 8
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

from benchmarks.case import Bench, Case, Wanted  # noqa: E402
from tests.peer.llama import find_library  # noqa: E402

SHARED = ROOT.parent / "shared"
TYPES = "Q2_K,Q3_K_S,Q4_K_S,IQ2_XXS,IQ2_S,IQ3_XXS"
WINDOWS = 16
CALIBRATION_SHARE = 0.75  # of the text in tests/, where there is no other; the rest is judged on
START, END = "<!-- quality: written by benchmarks/quality.py -->\n", "<!-- end of quality -->\n"


def default_cases(models: list[Path], calibration: Path | None, evaluation: list[Path], work: Path) -> list[Case]:
    """The models asked for or found, each with every text to judge it on."""
    models = models or [ROOT / "tests/models/stories-4m", SHARED / "models/prose-7m"]
    text = SHARED / "text"
    cases = []
    for model in [model for model in models if model.is_dir()]:
        if text.is_dir():
            stories = "stories" in model.name
            found = [text / "stories-a.txt"] if stories else [text / "technical-a.txt", text / "wiki.test.raw"]
            seen = text / "calibration.txt"
        else:
            seen, unseen = _split(ROOT / "tests/models/stories.txt", work)
            found = [unseen]
        cases += [Case(model, calibration or seen, judged) for judged in evaluation or found]
    return cases


def _split(text: Path, work: Path) -> tuple[Path, Path]:
    """A text cut in two at the end of a line: the first part to calibrate on, the second to judge on."""
    content = text.read_text(encoding="utf-8")
    cut = content.index("\n", int(CALIBRATION_SHARE * len(content))) + 1
    parts = work / f"{text.stem}-calibration.txt", work / f"{text.stem}-evaluation.txt"
    for path, part in zip(parts, (content[:cut], content[cut:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return parts


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


def write_readme(text: str) -> None:
    """Put the tables between the markers in README.md."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    readme.write_text(before + START + text + END + rest.split(END)[1], encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, action="append", help="a Hugging Face folder; may be repeated")
    parser.add_argument("--types", default=TYPES, help=f"llama.cpp's types, by commas; default {TYPES}")
    parser.add_argument("--like", default="", help="types whose bytes rondel may allocate as it likes, by commas")
    parser.add_argument("--methods", default="", help="of rondel quantize --method, by commas; default: its own choice")
    parser.add_argument("--arguments", default="", help="more options of rondel quantize, as one string")
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
    arguments = tuple(options.arguments.split())
    wanted = [
        Wanted(type_, like, method or None, arguments)
        for types, like in ((options.types, False), (options.like, True))
        for type_ in filter(None, types.split(","))
        for method in options.methods.split(",")
    ]
    cases = default_cases(options.model or [], options.calibration, options.evaluation or [], options.work)
    told = [run(Bench(case, options.work, limit=options.windows, threads=options.threads), wanted) for case in cases]
    text = "\n".join(table(case) for case in told)
    if options.write_readme:
        write_readme(text)
    print(json.dumps({"cases": told}, indent=1) if options.json else text)


if __name__ == "__main__":
    main()
