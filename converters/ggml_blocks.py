"""ggml's blocks with one scale, or a scale and an offset, packed from codes in numpy.

Every 32 columns of a row are one block: a float16 scale d, a float16 offset m (Q4_1, Q5_1), 32 fifth bits (Q5_0, Q5_1),
then 16 bytes of nibbles, column j low and column j + 16 high; or, for Q8_0, 32 signed bytes behind d.

    Q4_0, Q5_0, Q8_0   weight = d (code - zero)        Q4_1, Q5_1   weight = d code + m
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = 32


@dataclass(frozen=True)
class BlockFormat:
    """A ggml type of blocks of 32: `bits` per code, the code that means 0, and whether an offset is stored."""

    name: str
    bits: int
    zero: int = 0
    offset: bool = False

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -128 if self.bits == 8 else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return 127 if self.bits == 8 else (1 << self.bits) - 1


BLOCK_FORMATS = {
    format.name: format
    for format in (
        BlockFormat("Q4_0", 4, zero=8),
        BlockFormat("Q5_0", 5, zero=16),
        BlockFormat("Q8_0", 8),
        BlockFormat("Q4_1", 4, offset=True),
        BlockFormat("Q5_1", 5, offset=True),
    )
}


def pack_blocks(
    format: BlockFormat,
    codes: NDArray[np.integer],
    scales: NDArray[np.float16],
    offsets: NDArray[np.float16] | None = None,
) -> NDArray[np.uint8]:
    """Pack codes (rows, cols), scales and offsets (rows, cols / 32) into bytes."""
    rows, cols = codes.shape
    assert cols % COLUMNS == 0, f"{cols} columns"
    assert scales.shape == (rows, cols // COLUMNS)
    assert (offsets is not None) == format.offset
    assert not codes.size or format.lowest <= codes.min() <= codes.max() <= format.highest
    blocks = codes.reshape(-1, COLUMNS)
    parts: list[NDArray[Any]] = [_bytes(scales)]
    if offsets is not None:
        parts.append(_bytes(offsets))
    if format.bits == 8:
        parts.append(blocks.astype(np.int8).view(np.uint8))
    else:
        unsigned = blocks.astype(np.uint8)
        if format.bits == 5:
            parts.append(np.packbits(unsigned >> 4, axis=1, bitorder="little"))
        low = unsigned & 15
        parts.append(low[:, : COLUMNS // 2] | low[:, COLUMNS // 2 :] << 4)
    return np.concatenate(parts, axis=1).reshape(-1)


def _bytes(halves: NDArray[np.float16]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(halves, "<f2").reshape(-1, 1).view(np.uint8)
