"""Rounds one matrix onto a block format, and measures what that loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from rondel.converters.errors import RondelError
from rondel.converters.folder import Packed
from rondel.native.formats import Bytes, Floats, NativeError, decode, encode
from rondel.quant.importance import Means

WEIGHTS_AT_ONCE = 1 << 26  # rounded in one call: bounds the float copy of a large embedding to 256 MiB


class Encoder(Protocol):
    """What rounds some rows (rows, cols) of a matrix: `rondel.native.formats.encode`, or another in its form."""

    def __call__(self, name: str, weights: Floats, importance: Means | None = None, *, threads: int = 1) -> Bytes:
        """The packed bytes in the format `name`."""
        ...


@dataclass(frozen=True)
class Rounded:
    """The packed bytes of a matrix, and what the manifest tells of it."""

    packed: Bytes
    error: float  # weighted relative squared error of the weights
    weighted: bool  # by the statistics' diagonal; else every column counts the same
    told: Mapping[str, Any] = field(default_factory=dict)  # more, by the method

    def to_json(self) -> dict[str, Any]:
        """What the manifest holds."""
        return {"error": six_digits(self.error), "weighted": self.weighted, **self.told}


def six_digits(value: float) -> float:
    """A measured number for the manifest: its last digits depend on the machine."""
    return float(f"{value:.6g}")


def row_pieces(rows: int, cols: int) -> Iterator[slice]:
    """Row ranges of at most WEIGHTS_AT_ONCE weights, whole panels of the tile formats."""
    step = max(16, WEIGHTS_AT_ONCE // cols // 16 * 16)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def error_sums(weights: Floats, decoded: Floats, importance: Means | None) -> tuple[float, float]:
    """sum of importance * (weights - decoded)^2 and of importance * weights^2."""
    lost = np.square(weights - decoded, dtype=np.float64).sum(0)
    whole = np.square(weights, dtype=np.float64).sum(0)
    counts = np.ones(len(lost)) if importance is None else importance.astype(np.float64)
    return float(lost @ counts), float(whole @ counts)


@contextmanager
def naming(name: str, first: int = 0) -> Iterator[None]:
    """What an encoder refuses, weights that are not finite above all, as a sentence with the matrix's name."""
    try:
        yield
    except NativeError as error:
        where = f"{name}, from row {first} on" if first else name
        raise RondelError(f"{where}: {error}") from error


def round_matrix(
    name: str, weights: torch.Tensor, format: str, importance: Means | None, threads: int, *, encoder: Encoder = encode
) -> Rounded:
    """Round a matrix (rows, cols) to nearest.

    `importance` (cols,) says how much each column counts; `name` is for the message about weights that are not finite.
    """
    rows, cols = weights.shape
    parts, lost, whole = [], 0.0, 0.0
    for piece in row_pieces(rows, cols):
        values = float_rows(weights, piece)
        with naming(name, piece.start):
            parts.append(encoder(format, values, importance, threads=threads))
        piece_lost, piece_whole = error_sums(values, decode(format, parts[-1], *values.shape), importance)
        lost, whole = lost + piece_lost, whole + piece_whole
    return Rounded(np.concatenate(parts), lost / whole if whole > 0 else 0.0, importance is not None)


def float_rows(weights: torch.Tensor, rows: slice) -> Floats:
    """Some rows as the encoders read them."""
    return weights[rows].to(torch.float32).contiguous().numpy()


def stored(format: str, packed: Bytes, shape: tuple[int, ...]) -> torch.Tensor | Packed:
    """The tensor to write: floats are stored as floats, so that every later stage can read them."""
    data = torch.from_numpy(packed)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return data.view(kinds[format]).reshape(shape) if format in kinds else Packed(data, format, shape)
