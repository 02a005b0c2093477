"""The tile formats U2, U4, U8 of rondel files in numpy: the specification's second witness beside the C decoder.

A panel is 16 rows. Along the columns stand 64-byte tiles of 16 dwords, dword r for row r; byte b of a dword holds
8/bits fields, lowest bits first, and field f of byte b is column 4 f + b of the tile. After each group of G columns
stand 16 float16 scales.

    byte b of a U2 dword:  [ column 12+b | column 8+b | column 4+b | column b ]   weight = s (q - 1.5)
    byte b of a U4 dword:  [       column 4+b         |       column b        ]   weight = s (q - 8)
    byte b of a U8 dword:  [                 column b                         ]   weight = s q, q signed
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rondel.converters.errors import RondelError

PANEL_ROWS = 16
GROUPS = (64, 128, 256)
ZERO_POINTS = {2: 1.5, 4: 8.0, 8: 0.0}


@dataclass(frozen=True)
class TileFormat:
    """A tile format: `bits` per code and `group` columns per float16 scale."""

    bits: int
    group: int

    @property
    def name(self) -> str:
        """The name in `rondel.tensor.format`, such as U4-128."""
        return f"U{self.bits}-{self.group}"

    def bytes(self, rows: int, cols: int) -> int:
        """Bytes of a packed (rows, cols) matrix, rows padded to whole panels."""
        self.check_columns(cols)
        panels = -(-rows // PANEL_ROWS)
        return panels * (cols // self.group) * (PANEL_ROWS * self.group * self.bits // 8 + 2 * PANEL_ROWS)

    def check_columns(self, cols: int) -> None:
        """Refuse a row length that is not a multiple of the group."""
        if cols % self.group:
            raise RondelError(f"{self.name} needs a multiple of {self.group} columns, got {cols}")


TILE_FORMATS = {f.name: f for f in (TileFormat(bits, group) for bits in ZERO_POINTS for group in GROUPS)}


def pack_tiles(tile: TileFormat, codes: NDArray[np.integer], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Pack codes (rows, cols), signed for U8, and scales (rows, cols / G) into bytes; padding rows are zero."""
    rows, cols = codes.shape
    tile.check_columns(cols)
    low = -128 if tile.bits == 8 else 0
    if codes.size and not low <= codes.min() <= codes.max() < low + (1 << tile.bits):
        raise RondelError(
            f"{tile.name} holds codes {low} to {low + (1 << tile.bits) - 1}, got {codes.min()} to {codes.max()}"
        )
    groups, fields = cols // tile.group, 8 // tile.bits
    if scales.shape != (rows, groups):
        raise RondelError(f"{tile.name} needs scales of shape {(rows, groups)}, got {scales.shape}")
    panels = -(-rows // PANEL_ROWS)
    padding = ((0, panels * PANEL_ROWS - rows), (0, 0))
    # (panel, row, group, tile, field, byte) -> (panel, group, tile, row, byte) with the fields merged
    fielded = np.pad(codes, padding).astype(np.uint8).reshape(panels, PANEL_ROWS, groups, -1, fields, 4)
    shifts = (tile.bits * np.arange(fields, dtype=np.uint8)).reshape(fields, 1)
    merged = np.bitwise_or.reduce(fielded << shifts, axis=4).transpose(0, 2, 3, 1, 4)
    ends = np.pad(scales.astype("<f2"), padding).reshape(panels, PANEL_ROWS, groups).transpose(0, 2, 1)
    packed = [merged.reshape(panels, groups, -1), np.ascontiguousarray(ends).view(np.uint8)]
    return np.concatenate(packed, axis=2).reshape(-1)


def unpack_tiles(
    tile: TileFormat, packed: NDArray[np.uint8], rows: int, cols: int
) -> tuple[NDArray[np.int16], NDArray[np.float16]]:
    """The codes (rows, cols) and scales (rows, cols / G) that `pack_tiles` packed."""
    if packed.size != tile.bytes(rows, cols):
        raise RondelError(
            f"a ({rows}, {cols}) matrix of {tile.name} has {tile.bytes(rows, cols)} bytes, got {packed.size}"
        )
    panels, groups, fields = -(-rows // PANEL_ROWS), cols // tile.group, 8 // tile.bits
    frames = packed.reshape(panels, groups, -1) if packed.size else packed.reshape(panels, groups, 2 * PANEL_ROWS)
    merged = frames[..., : -2 * PANEL_ROWS].reshape(panels, groups, -1, PANEL_ROWS, 1, 4)
    shifts = (tile.bits * np.arange(fields, dtype=np.uint8)).reshape(fields, 1)
    fielded = merged >> shifts & np.uint8((1 << tile.bits) - 1)
    codes = fielded.transpose(0, 3, 1, 2, 4, 5).reshape(panels * PANEL_ROWS, cols)[:rows]
    scales = np.ascontiguousarray(frames[..., -2 * PANEL_ROWS :]).view("<f2").transpose(0, 2, 1)
    signed = codes.view(np.int8) if tile.bits == 8 else codes
    return signed.astype(np.int16), scales.reshape(panels * PANEL_ROWS, groups)[:rows]


def decode_tiles(tile: TileFormat, packed: NDArray[np.uint8], rows: int, cols: int) -> NDArray[np.float32]:
    """Packed bytes to (rows, cols) weights, bit for bit as the runtime decodes them."""
    codes, scales = unpack_tiles(tile, packed, rows, cols)
    centred = codes.astype(np.float32) - np.float32(ZERO_POINTS[tile.bits])
    return np.repeat(scales.astype(np.float32), tile.group, axis=1) * centred
