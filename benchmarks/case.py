"""One model of the quality benchmark: its statistics and its files by either quantizer, made, kept and judged."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rondel.converters.gguf_reader import GgufFile
from rondel.converters.imatrix import read_imatrix
from rondel.converters.logits import LogitsFile, LogitsWriter
from rondel.converters.metadata import file_type
from rondel.quant.perplexity import perplexity, windows
from tests.peer.llama import Llama, find_library
from tests.peer.quantizer import find_quantizer, ggml_quantize, llama_quantize

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 512
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
