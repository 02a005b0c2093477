"""Owns affine rounding to nearest: the scale follows from the largest weight alone, without statistics or search.

    symmetric    s = max |w| / L           code = round(w / s) + zero      Q4_0, Q5_0, Q8_0, U2, U4, U8
    asymmetric   s = (max w - min w) / L   code = round((w - min w) / s)   Q4_1, Q5_1

with L the largest level. The largest weight is that of a block ("group"), a row ("channel") or the whole matrix
("tensor"); the formats store a scale a block, so the file is as large either way, and coarser scales only lose.
The other formats have scales in two layers or codebooks, where rounding to nearest means the encoder without weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rondel.converters.errors import RondelError
from rondel.converters.ggml_blocks import BLOCK_FORMATS, COLUMNS, pack_blocks
from rondel.converters.tiles import TILE_FORMATS, ZERO_POINTS, pack_tiles
from rondel.native.formats import Bytes, Floats, NativeError, encode
from rondel.quant.importance import Means

GRANULARITIES = ("group", "channel", "tensor")
AT_ONCE = 1 << 22  # weights whose codes are in memory at a time


@dataclass(frozen=True)
class Grid:
    """The levels of a format: weight = s (code - zero), or s code + offset."""

    lowest: int
    highest: int
    zero: float
    group: int
    offset: bool

    @property
    def reach(self) -> float:
        """L: the level that the largest weight is put on."""
        return self.highest - self.zero


def grid_of(format: str) -> Grid | None:
    """The levels of a format with one scale a block; None for every other format."""
    if format in BLOCK_FORMATS:
        block = BLOCK_FORMATS[format]
        return Grid(block.lowest, block.highest, block.zero, COLUMNS, block.offset)
    if format in TILE_FORMATS:
        tile = TILE_FORMATS[format]
        lowest = -128 if tile.bits == 8 else 0
        return Grid(lowest, lowest + (1 << tile.bits) - 1, ZERO_POINTS[tile.bits], tile.group, False)
    return None


def check_granularity(rounding: str, granularity: str, formats: dict[str, str]) -> None:
    """Refuse a granularity that a matrix of a block cannot have; `formats` holds the format of each matrix.

    Embedding and head often have a format of their own, which keeps its own scales.
    """
    if granularity not in GRANULARITIES:
        raise RondelError(f"--granularity {granularity}: expected one of {', '.join(GRANULARITIES)}")
    if granularity == "group":
        return
    if rounding != "rtn":
        raise RondelError(f"--granularity {granularity}: {rounding} searches a scale for every group; use --method rtn")
    for name, format in formats.items():
        if name.startswith("blk.") and grid_of(format) is None:
            affine = ", ".join([*BLOCK_FORMATS, "U2, U4, U8"])
            raise RondelError(
                f"--granularity {granularity}: {name} becomes {format}, whose scales belong to its groups; "
                f"use --granularity group, or one of {affine} for every matrix"
            )


class AffineEncoder:
    """An encoder in the form of `rondel.native.formats.encode` for the pieces of one matrix `weights` (rows, cols)."""

    def __init__(self, weights: torch.Tensor, granularity: str) -> None:
        self.granularity = granularity
        limits = torch.stack([weights.amin(), weights.amax()]).to(torch.float32).numpy()
        # Where they are not finite, the piece that holds the weight will say so.
        self._limits = limits if np.isfinite(limits).all() else np.zeros_like(limits)

    def __call__(self, name: str, weights: Floats, importance: Means | None = None, *, threads: int = 1) -> Bytes:
        """Pack some rows. Nothing here depends on `importance`; `threads` serve the formats without a grid."""
        grid = grid_of(name)
        if grid is None:
            return encode(name, weights, threads=threads)
        rows, cols = weights.shape
        _check_finite(weights)
        step = max(16, AT_ONCE // cols // 16 * 16)  # whole panels of the tile formats
        return np.concatenate([self._rows(name, grid, weights[at : at + step]) for at in range(0, rows, step)])

    def _rows(self, name: str, grid: Grid, weights: Floats) -> Bytes:
        blocks = weights.reshape(len(weights), -1, grid.group)
        least, most = self._extent(blocks)
        with np.errstate(over="ignore"):
            width = most - least if grid.offset else np.maximum(-least, most)
        scales = _halves(name, np.divide(width, grid.reach, dtype=np.float32))
        offsets = _halves(name, least) if grid.offset else None
        codes = _codes(blocks, grid, scales, offsets).reshape(weights.shape)
        if name in TILE_FORMATS:
            return pack_tiles(TILE_FORMATS[name], codes, scales)
        return pack_blocks(BLOCK_FORMATS[name], codes, scales, offsets)

    def _extent(self, blocks: Floats) -> tuple[Floats, Floats]:
        """Smallest and largest weight that each block (rows, blocks) is scaled for."""
        shape = blocks.shape[:2]
        if self.granularity == "tensor":
            return np.full(shape, self._limits[0]), np.full(shape, self._limits[1])
        axes = 2 if self.granularity == "group" else (1, 2)
        least, most = blocks.min(axes, keepdims=True), blocks.max(axes, keepdims=True)
        return np.broadcast_to(least[..., 0], shape), np.broadcast_to(most[..., 0], shape)


def _check_finite(weights: Floats) -> None:
    bad = np.argwhere(~np.isfinite(weights))
    if len(bad):
        raise NativeError(f"the weight at row {bad[0][0]}, column {bad[0][1]} is not finite")


def _halves(name: str, values: Floats) -> NDArray[np.float16]:
    """The nearest values that a half can store."""
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16)
    if not np.isfinite(stored).all():
        raise NativeError(f"a scale of {float(np.abs(values).max()):g} is beyond what {name} can hold (65504)")
    return stored


def _codes(
    blocks: Floats, grid: Grid, scales: NDArray[np.float16], offsets: NDArray[np.float16] | None
) -> NDArray[np.int16]:
    """The nearest codes for the scales as they are stored; a scale of zero has the code nearest to level 0."""
    step = scales.astype(np.float32)[..., None]
    shifted = blocks if offsets is None else blocks - offsets.astype(np.float32)[..., None]
    levels = np.divide(shifted, step, out=np.zeros_like(blocks), where=step != 0)
    return np.rint(levels + np.float32(grid.zero)).clip(grid.lowest, grid.highest).astype(np.int16)
