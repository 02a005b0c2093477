"""The judged comparison: rondel's files and llama-quantize's, both measured by llama.cpp against the float model.

For each model: `rondel calibrate` on one text; the float GGUF; for each type llama.cpp's own quantizer with the imatrix
file that calibrate wrote, and `rondel quantize`; then perplexity and KL divergence by llama.cpp's protocol on a text
that calibration did not see. Everything made on the way is kept in a work folder: a second call makes what changed.

    python benchmarks/quality.py --model MODEL --types Q2_K,IQ2_XXS --methods imatrix,gptq --windows 8
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the peer, which the tests own

from rondel.converters.gguf_reader import GgufFile  # noqa: E402
from rondel.converters.imatrix import read_imatrix  # noqa: E402
from rondel.converters.logits import LogitsFile, LogitsWriter  # noqa: E402
from rondel.converters.metadata import file_type  # noqa: E402
from rondel.quant.perplexity import perplexity, windows  # noqa: E402
from tests.peer.llama import Llama, find_library  # noqa: E402
from tests.peer.quantizer import find_quantizer, ggml_quantize, llama_quantize  # noqa: E402

SHARED = ROOT.parent / "shared"
TYPES = "Q2_K,Q3_K_S,Q4_K_S,IQ2_XXS,IQ2_S,IQ3_XXS"
WINDOWS = 16
CONTEXT = 512
CALIBRATION_SHARE = 0.75  # of the text in tests/, where there is no other; the rest is judged on
START, END = "<!-- quality: written by benchmarks/quality.py -->\n", "<!-- end of quality -->\n"
# What decides the statistics, so that work on the encoders does not make them anew.
CALIBRATION_CODE = (
    "quant/calibrate.py",
    "quant/calibration_text.py",
    "quant/activations.py",
    "quant/hidden_states.py",
    "quant/decoder_layers.py",
    "converters/huggingface.py",
    "converters/tokenizer.py",
    "converters/stats.py",
)


@dataclass(frozen=True)
class Case:
    """A model, what it is calibrated on, and what it is judged on."""

    model: Path
    calibration: Path
    evaluation: Path


@dataclass(frozen=True)
class Wanted:
    """One file to compare: llama.cpp's type, and how rondel is asked for as many bytes."""

    type: str
    like: bool
    method: str | None
    arguments: tuple[str, ...]  # passed on to `rondel quantize`

    @property
    def name(self) -> str:
        """How tables call rondel's file."""
        parts = ["rondel", *(["--like"] if self.like else []), *([self.method] if self.method else []), *self.arguments]
        return " ".join(parts)

    @property
    def command(self) -> list[str]:
        """The options of `rondel quantize`."""
        method = ["--method", self.method] if self.method else []
        return ["--like" if self.like else "--type", self.type, *method, *self.arguments]


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


def digest(*things: Any) -> str:
    """One name for what a result depends on: contents of files, and anything JSON can write."""
    hashed = hashlib.sha256()
    for thing in things:
        hashed.update(thing.read_bytes() if isinstance(thing, Path) else json.dumps(thing).encode())
        hashed.update(b"\0")
    return hashed.hexdigest()


def code(*places: str) -> str:
    """The code that decides a result: files and folders of the repository."""
    found = [path for place in places for path in sorted([ROOT / place, *(ROOT / place).rglob("*.py")])]
    return digest(*(path for path in found if path.is_file()))


def kept(out: Path, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` told when it made `out`, which happens again only when `key` changes."""
    note = out.with_name(out.name + ".json")
    if out.exists() and note.exists():
        told: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        if told["key"] == key:
            return told
    out.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    started = time.perf_counter()
    made = make()
    told = {"key": key, "seconds": time.perf_counter() - started, **made}
    note.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


def rondel(*arguments: str | Path) -> float:
    """Run one command of rondel; returns the seconds it took."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "rondel.cli", *map(str, arguments), "--quiet"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"rondel {' '.join(map(str, arguments))}\n{done.stderr}")
    return time.perf_counter() - started


class Bench:
    """One case in its work folder."""

    def __init__(self, case: Case, work: Path, *, limit: int, threads: int) -> None:
        self.case = case
        self.limit = limit
        self.threads = threads
        config = json.loads((case.model / "config.json").read_text(encoding="utf-8"))
        self.context = min(CONTEXT, config["max_position_embeddings"])
        self.folder = work / case.model.name
        self.weights = digest(*sorted(case.model.glob("*.safetensors")), config)
        self.program = digest(code("quant", "converters", "native"), *sorted(ROOT.glob("native/src/**/*.[ch]")))
        self.calibration = self.folder / f"calibration-{case.calibration.stem}"
        self.imatrix = self.calibration / "imatrix.gguf"
        self.base = self.folder / "float.gguf"

    def prepare(self) -> None:
        """Statistics, the float model, and its logits."""
        key = digest(self.weights, self.case.calibration, self.context, code(*CALIBRATION_CODE))
        self.statistics = kept(self.calibration, key, self._calibrate)
        kept(self.base, digest(self.weights, code("converters")), self._export_float)
        with Llama(self.base, context=self.context, threads=self.threads) as peer:
            text = self.case.evaluation.read_bytes().decode("utf-8", "replace")
            self.windows = windows(peer.tokenize(text), self.context, self.limit)
        self.logits = self.folder / f"logits-{self.case.evaluation.stem}-{len(self.windows)}.bin"
        self.judged = digest(self.base, self.windows.tolist(), str(find_library()))
        self.of_base = kept(self.logits, self.judged, self._save_logits)

    def _calibrate(self) -> dict[str, Any]:
        text = ("--text", self.case.calibration, "--context", str(self.context))
        rondel("calibrate", self.case.model, *text, "-o", self.calibration, "--threads", str(self.threads), "--force")
        return {}

    def _export_float(self) -> dict[str, Any]:
        rondel("export", self.case.model, "--type", "F32", "-o", self.base, "--force")
        return {}

    def _save_logits(self) -> dict[str, Any]:
        with Llama(self.base, context=self.context, threads=self.threads) as peer:
            writer = LogitsWriter(self.logits, self.windows, peer.vocabulary)
            with writer:
                return perplexity(self.windows, _evaluate(peer), begin=peer.begin, save=writer)

    def theirs(self, type_: str) -> dict[str, Any]:
        """llama-quantize's file of a type, judged."""
        out = self.folder / "llama-quantize" / f"{type_}.gguf"
        library = find_quantizer()
        key = digest(self.base, self.imatrix, type_, str(library or find_library()))
        told = kept(out, key, lambda: self._quantize_as_llama(out, type_))
        return {"by": "llama-quantize", "type": type_, "seconds": told["seconds"]} | self.judge(out)

    def _quantize_as_llama(self, out: Path, type_: str) -> dict[str, Any]:
        number, means = file_type(type_), read_imatrix(self.imatrix).values
        if number is None:
            raise SystemExit(f"{type_}: llama-quantize knows no such type")
        if find_quantizer():
            llama_quantize(self.base, out, number, means, self.threads)
            return {}
        layout = self.ours(Wanted(type_, like=False, method=None, arguments=()))[1]
        started = time.perf_counter()
        ggml_quantize(self.base, out, layout, means)
        return {"seconds": time.perf_counter() - started}

    def ours(self, wanted: Wanted) -> tuple[float, Path]:
        """rondel's file, and the seconds that `rondel quantize` took."""
        name = " ".join(wanted.command).removeprefix("--").replace("/", "_").replace(" ", "-")
        folder = self.folder / "rondel" / name
        file = folder.with_name(name + ".gguf")

        def make() -> dict[str, Any]:
            stats = ("--stats", self.calibration, "--threads", str(self.threads))
            seconds = rondel("quantize", self.case.model, *stats, *wanted.command, "-o", folder, "--force")
            rondel("export", folder, "-o", file, "--force")
            return {"seconds": seconds}

        key = digest(self.weights, self.statistics["key"], self.program, wanted.command)
        return kept(file, key, make)["seconds"], file

    def compared(self, wanted: Wanted) -> dict[str, Any]:
        """rondel's file, judged."""
        seconds, file = self.ours(wanted)
        return {"by": wanted.name, "type": wanted.type, "seconds": seconds} | self.judge(file)

    def judge(self, file: Path) -> dict[str, Any]:
        """Bytes of a file, its perplexity, and its divergence from the float model."""
        verdict = file.with_name(f"{file.stem}.{self.logits.stem}.json")

        def measure() -> dict[str, Any]:
            with Llama(file, context=self.context, threads=self.threads) as peer:
                told = perplexity(self.windows, _evaluate(peer), begin=peer.begin, base=LogitsFile(self.logits))
            verdict.touch()
            return {"score": told | {"bytes": file.stat().st_size, "tensor_bytes": _tensor_bytes(file)}}

        return dict(kept(verdict, digest(self.judged, file), measure)["score"])


def _evaluate(peer: Llama) -> Callable[[Any, int], Any]:
    def evaluate(window: np.ndarray, first: int) -> np.ndarray:
        peer.forget()
        return peer.eval(window.tolist())[first:]

    return evaluate


def _tensor_bytes(file: Path) -> int:
    """All that lies behind the first tensor's offset, padding between tensors included."""
    return file.stat().st_size - min(tensor.offset for tensor in GgufFile(file).tensors.values())


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
