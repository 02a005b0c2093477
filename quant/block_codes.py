"""Owns the whole numbers of packed matrices as arrays: read from a format's bytes, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rondel.converters.folder import Packed
from rondel.converters.ggml_types import GGML_TYPES
from rondel.converters.tiles import PANEL_ROWS, TILE_FORMATS, ZERO_POINTS, pack_tiles, unpack_tiles
from rondel.quant.block_layouts import Field, layouts

Kind = Literal["codes", "scales", "mins"]
KINDS: tuple[Kind, ...] = ("codes", "scales", "mins")


@dataclass(frozen=True)
class Numbers:
    """Whole numbers 0..top of one kind, int32 (blocks, numbers of a block); number n means unit (n + zero).

    Blocks stand row by row, each with its own float16 scales.
    """

    values: NDArray[np.int32]
    top: int
    zero: float
    unit: float


def read_numbers(packed: Packed) -> dict[Kind, Numbers]:
    """The whole numbers of a packed matrix that can be changed one by one; none for formats that have none such."""
    tile = TILE_FORMATS.get(packed.format)
    if tile:
        codes, _ = unpack_tiles(tile, packed.data.numpy(), *packed.shape)
        lowest = -128 if tile.bits == 8 else 0
        values = (codes.astype(np.int32) - lowest).reshape(-1, tile.group)
        return {"codes": Numbers(values, (1 << tile.bits) - 1, lowest - ZERO_POINTS[tile.bits], 1)}
    blocks = _blocks(packed.data.numpy(), packed.format)
    fields = _fields(packed.format)
    return {kind: Numbers(field.read(blocks), field.top, field.zero, field.unit) for kind, field in fields.items()}


def with_numbers(packed: Packed, numbers: Mapping[Kind, NDArray[np.int32]]) -> Packed:
    """The packed matrix with other numbers of some kinds, shaped and bounded as read_numbers gives them."""
    tile = TILE_FORMATS.get(packed.format)
    if tile:
        rows, cols = packed.shape
        codes, scales = unpack_tiles(tile, packed.data.numpy(), -(-rows // PANEL_ROWS) * PANEL_ROWS, cols)
        if "codes" in numbers:
            codes[:rows] = numbers["codes"].reshape(rows, cols) + (-128 if tile.bits == 8 else 0)
        data = pack_tiles(tile, codes, scales)
    else:
        data = packed.data.numpy().copy()
        fields = _fields(packed.format)
        for kind, values in numbers.items():
            fields[kind].write(_blocks(data, packed.format), values)
    return Packed(torch.from_numpy(data), packed.format, packed.shape)


def _fields(format: str) -> dict[Kind, Field]:
    layout = layouts().get(format)
    return {kind: field for kind in KINDS if layout and (field := getattr(layout, kind)) is not None}


def _blocks(data: NDArray[np.uint8], format: str) -> NDArray[np.uint8]:
    return data.reshape(-1, GGML_TYPES[format].bytes)
