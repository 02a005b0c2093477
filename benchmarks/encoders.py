"""Measures rondel's encoders against ggml's, type by type: seconds for the same weights and the weighted squared error.

Every round runs both encoders on one thread, one after the other, and takes the ratio of their processor times: two
runs beside each other see the same machine, so the median of the ratios holds on a noisy one. Needs the extra `peer`.

    python -m benchmarks.encoders [--model DIR --imatrix FILE] [--types Q4_K,Q6_K] [--rounds 15]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from rondel.native.formats import decode, encode, formats
from tests.peer.ggml import ggml_encode
from tests.peer.llama import find_library

COLUMNS = 1024
ROUND_SECONDS = 0.04  # the least time of one timed call: far above the clock's step and one switch of the scheduler
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
    """The matrices of a Hugging Face folder with their means of an imatrix file, or drawn importance where it has none."""
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


def theirs_of(name: str, matrix: Matrix, size: int) -> np.ndarray:
    """ggml's bytes."""
    return ggml_encode(formats()[name].ggml_type, matrix.weights, matrix.importance, size)


def error_ratio(name: str, matrices: list[Matrix]) -> float:
    """Our weighted squared error over ggml's; every matrix counts by its own energy, so that none hides the others."""
    lost = np.zeros(2)
    for matrix in matrices:
        ours = encode(name, matrix.weights, matrix.importance)
        energy = np.square(matrix.weights, dtype=np.float64).sum(0) @ matrix.importance
        for i, packed in enumerate((ours, theirs_of(name, matrix, ours.size))):
            difference = matrix.weights.astype(np.float64) - decode(name, packed, *matrix.weights.shape)
            lost[i] += np.square(difference).sum(0) @ matrix.importance / energy
    return float(lost[0] / lost[1])


def seconds(call: Callable[[], object]) -> float:
    """Processor time of this thread."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def measure(name: str, rounds: int, groups: list[list[Matrix]]) -> Row:
    """Both encoders in turn, on as many rows as make a round long enough."""
    rows = 16
    size = encode(name, drawn(rows).weights).size  # bytes of 16 rows
    theirs_of(name, drawn(rows), size)  # ggml builds its tables at the first call
    matrix = drawn(rows)
    while seconds(lambda: encode(name, matrix.weights, matrix.importance)) < ROUND_SECONDS:
        rows *= 2
        matrix = drawn(rows)
    pairs = []
    for _ in range(rounds):
        ours = seconds(lambda: encode(name, matrix.weights, matrix.importance))
        pairs.append((ours, seconds(lambda: theirs_of(name, matrix, size * rows // 16))))
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
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="a Hugging Face folder; may be repeated"
    )
    parser.add_argument("--imatrix", type=Path, action="append", default=[], help="of the model at the same place")
    parser.add_argument("--types", default="", help="only these, with commas between")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if find_library() is None:
        parser.error("no llama.cpp here: make install-peer")
    groups = [[drawn(256)]]
    for i, model in enumerate(arguments.model):
        groups.append(list(of_model(model, arguments.imatrix[i] if i < len(arguments.imatrix) else None)))
    labels = ["drawn", *(model.name for model in arguments.model)]
    names = (
        arguments.types.split(",")
        if arguments.types
        else [n for n, f in formats().items() if f.encodes and f.block > 1]
    )
    heads = " | ".join(f"error, {label}" for label in labels)
    print(f"| type | rondel, M weights/s | ggml | times as fast | {heads} |")
    print("|---|" + "---|" * (3 + len(labels)))
    for name in names:
        if formats()[name].tiled:
            continue
        row = measure(name, arguments.rounds, groups)
        errors = " | ".join(f"{error:.3f}" for error in row.errors)
        print(
            f"| {row.name} | {row.ours / 1e6:.1f} | {row.theirs / 1e6:.1f} | {row.speed:.2f} | {errors} |", flush=True
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
