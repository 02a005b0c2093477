"""Multiplies the rows of a quantized matrix by changing nothing but the float16 scales of its blocks."""

from __future__ import annotations

import numpy as np

from rondel.converters.errors import RondelError
from rondel.converters.ggml_types import GGML_TYPES

# Where the float16 numbers that a whole block is proportional to stand inside it, in bytes (ggml's layouts).
SCALE_OFFSETS: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ1_S": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "Q1_0": (0,),
    "Q2_0": (0,),
}


def fold_into_blocks(data: np.ndarray, format: str, gain: np.ndarray, name: str) -> np.ndarray:
    """A copy of the packed bytes (uint8) whose row r is gain[r] times the old one, up to rounding its scales.

    Refuses formats whose blocks have no float16 scale, and gains that a scale cannot hold.
    """
    if format not in SCALE_OFFSETS:
        raise RondelError(f"{name}: a gain cannot be folded into {format}; use a format with float16 block scales")
    block_bytes = GGML_TYPES[format].bytes
    blocks = data.copy().reshape(gain.size, -1, block_bytes)
    for offset in SCALE_OFFSETS[format]:
        field = np.ascontiguousarray(blocks[:, :, offset : offset + 2])
        scales = field.view("<f2")[..., 0].astype(np.float64) * gain[:, None]
        with np.errstate(over="ignore"):
            halves = scales.astype("<f2")
        if not np.isfinite(halves).all():
            raise RondelError(f"{name}: a gain of {np.abs(gain).max():g} takes a block scale beyond float16")
        blocks[:, :, offset : offset + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(-1)
