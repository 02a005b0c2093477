"""Measures rondel's encoders against ggml's, type by type: seconds for the same weights and the weighted squared error.

Every round runs both encoders on one thread, one after the other, and takes the ratio of their processor times: two
runs beside each other see the same machine, so the median of the ratios holds on a noisy one. Needs the extra `peer`.

    python -m benchmarks.encoders [--model DIR --imatrix FILE] [--types Q4_K,Q6_K] [--rounds 15]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median

import numpy as np

from rondel.native.formats import decode, encode, format_bytes, formats
from tests.peer.ggml import ggml_encode
from tests.peer.llama import find_library

COLUMNS = 1024
CALL_SECONDS = 0.02  # the least time of one timed call: far above the clock's step and one switch of the scheduler
SMALLEST_MATRIX = 1 << 14  # weights; norms and the like stay float


@dataclass(frozen=True)
class Matrix:
    """Float32 weights (rows, cols) and how much the squared error of each column counts (cols,)."""

    weights: np.ndarray
    importance: np.ndarray


@dataclass(frozen=True)
class Row:
    """One type: weights a second of both encoders, ggml's time over ours, our error over ggml's by kind of matrix."""

    name: str
    ours: float
    theirs: float
    speed: float
    errors: list[float]


def drawn(rows: int) -> Matrix:
    """Heavy-tailed weights of the size that models have, under an importance as uneven as activations are."""
    random = np.random.default_rng(0)
    weights = (random.standard_t(5, (rows, COLUMNS)) * 0.02).astype(np.float32)
    return Matrix(weights, np.exp(random.standard_normal(COLUMNS)).astype(np.float32))


def of_model(model: Path, imatrix: Path | None) -> Iterator[Matrix]:
    """The matrices of a Hugging Face folder under their means of an imatrix file, or a drawn importance."""
    from rondel.converters.huggingface import open_huggingface
    from rondel.converters.imatrix import read_imatrix

    source = open_huggingface(model)
    means = read_imatrix(imatrix).values if imatrix else {}
    random = np.random.default_rng(1)
    for name in source.names():
        weights = source.read_float(name).numpy()
        if weights.ndim != 2 or weights.size < SMALLEST_MATRIX or weights.shape[1] % 256:
            continue
        drawn_means = np.exp(random.standard_normal(weights.shape[1])).astype(np.float32)
        yield Matrix(weights, means.get(name, drawn_means))


def ours_of(name: str, matrix: Matrix) -> np.ndarray:
    """rondel's bytes, on one thread."""
    return encode(name, matrix.weights, matrix.importance)


def theirs_of(name: str, matrix: Matrix) -> np.ndarray:
    """ggml's bytes."""
    size = format_bytes(name, *matrix.weights.shape)
    return ggml_encode(formats()[name].ggml_type, matrix.weights, matrix.importance, size)


def error_ratio(name: str, matrices: list[Matrix]) -> float:
    """Our weighted squared error over ggml's; every matrix counts by its own energy, so that none hides the others."""
    lost = np.zeros(2)
    for matrix in matrices:
        energy = np.square(matrix.weights, dtype=np.float64).sum(0) @ matrix.importance
        for i, encoder in enumerate((ours_of, theirs_of)):
            packed = encoder(name, matrix)
            difference = matrix.weights.astype(np.float64) - decode(name, packed, *matrix.weights.shape)
            lost[i] += np.square(difference).sum(0) @ matrix.importance / energy
    return float(lost[0] / lost[1])


def seconds(encoder: Callable[[str, Matrix], np.ndarray], name: str, matrix: Matrix) -> float:
    """Processor time of this thread."""
    start = time.thread_time()
    encoder(name, matrix)
    return time.thread_time() - start


def measure(name: str, rounds: int, groups: list[list[Matrix]]) -> Row:
    """Both encoders in turn, on as many rows as make a call long enough."""
    rows = 16
    matrix = drawn(rows)
    theirs_of(name, matrix)  # ggml builds its tables at the first call
    while seconds(ours_of, name, matrix) < CALL_SECONDS:
        rows *= 2
        matrix = drawn(rows)
    pairs = [(seconds(ours_of, name, matrix), seconds(theirs_of, name, matrix)) for _ in range(rounds)]
    count = matrix.weights.size
    return Row(
        name,
        count / median(ours for ours, _ in pairs),
        count / median(theirs for _, theirs in pairs),
        median(theirs / ours for ours, theirs in pairs),
        [error_ratio(name, group) for group in groups],
    )


def main() -> None:
    """Print one line a type."""
    parser = argparse.ArgumentParser(description="Speed and weighted error of rondel's encoders over ggml's.")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a Hugging Face folder; repeatable")
    parser.add_argument("--imatrix", type=Path, action="append", default=[], help="of the model at the same place")
    parser.add_argument("--types", default="", help="only these, with commas between")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if find_library() is None:
        parser.error("no llama.cpp here: make install-peer")
    groups = {"drawn": [drawn(256)]}
    for model, imatrix in zip_longest(arguments.model, arguments.imatrix):
        groups[model.name] = list(of_model(model, imatrix))
    written = [name for name, f in formats().items() if f.encodes and f.block > 1 and not f.tiled]
    heads = "".join(f" error, {label} |" for label in groups)
    print(f"| type | rondel, M weights/s | ggml | times as fast |{heads}")
    print("|---|---:|---:|---:|" + "---:|" * len(groups))
    for name in arguments.types.split(",") if arguments.types else written:
        row = measure(name, arguments.rounds, list(groups.values()))
        errors = "".join(f" {error:.3f} |" for error in row.errors)
        speeds = f"{row.ours / 1e6:.1f} | {row.theirs / 1e6:.1f} | {row.speed:.2f}"
        print(f"| {row.name} | {speeds} |{errors}", flush=True)


if __name__ == "__main__":
    main()
