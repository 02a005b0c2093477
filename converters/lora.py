"""Low-rank corrections as llama.cpp's LoRA file: an adapter GGUF that any llama.cpp adds to the model it was made for.

A matrix W (rows, cols) becomes W + B A, with A (rank, cols) and B (rows, rank), float16. Readers multiply B A by
alpha / rank: alpha is 1, and B is stored rank times as large, since matrices may have different ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rondel.converters.errors import RondelError
from rondel.converters.ggml_types import GGML_TYPES
from rondel.converters.gguf_keys import ALIGNMENT, Adapter, General
from rondel.converters.gguf_writer import Entry, Value, write_gguf
from rondel.converters.journal import writing

Factors = tuple[NDArray[np.float32], NDArray[np.float32]]  # B (rows, rank), A (rank, cols)
HALF_BYTES = 2


def lora_bytes(factors: Mapping[str, Factors]) -> int:
    """Bytes of the numbers of corrections by tensor name."""
    return sum(HALF_BYTES * matrix.size for pair in factors.values() for matrix in pair)


def _halves(name: str, matrix: NDArray[np.float32]) -> NDArray[np.uint8]:
    with np.errstate(over="ignore"):
        halves = np.ascontiguousarray(matrix, "<f2")
    if not np.isfinite(halves).all():
        raise RondelError(f"{name}: a correction is beyond the range of float16; choose a smaller --rank")
    return halves.reshape(-1).view(np.uint8)


def write_lora(path: Path, architecture: str, factors: Mapping[str, Factors], name: str) -> None:
    """Write corrections by the name of the tensor that they belong to; `architecture` is the model's, `name` theirs.

    Raises RondelError for numbers beyond float16.
    """
    keys: dict[str, Value] = {
        General.TYPE: Adapter.TYPE_VALUE,
        General.ARCHITECTURE: architecture,
        General.NAME: name,
        Adapter.TYPE: Adapter.LORA,
        Adapter.ALPHA: 1.0,
    }
    entries, data = [], []
    for tensor, (b, a) in factors.items():
        assert b.shape[1] == len(a), f"{tensor}: factors of two ranks"
        for suffix, matrix in ((Adapter.A, a), (Adapter.B, len(a) * b)):
            data.append(_halves(tensor, matrix))
            shape = (matrix.shape[1], matrix.shape[0])
            entries.append(Entry(tensor + suffix, shape, GGML_TYPES["F16"].number, data[-1].size))
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        write_gguf(partial, keys, entries, lambda index: data[index], alignment=ALIGNMENT)
        partial.replace(path)
