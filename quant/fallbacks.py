"""Which format stands in where the rows of a matrix are no multiple of a format's block: a smaller block, then F16."""

from __future__ import annotations

from rondel.native.formats import formats

TERNARY = ("TQ1_0", "TQ2_0", "Q2_0")
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
FALLBACKS |= dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL")
FALLBACKS |= dict.fromkeys(TERNARY, "Q4_0")
TILE_FALLBACKS = {"U2": "Q4_0", "U4": "Q4_0", "U8": "Q8_0"}  # after the smaller groups
LAST_FALLBACK = "F16"


def is_tile(format: str) -> bool:
    """Whether a format is one of rondel's own, which llama.cpp cannot read."""
    return format in formats() and formats()[format].tiled


def fitting(format: str, cols: int) -> str:
    """The format itself where a row of `cols` fits it, else what stands in for it."""
    if cols % formats()[format].block == 0:
        return format
    bits, _, group = format.partition("-")
    for smaller in ("128", "64") if is_tile(format) else ():
        if int(smaller) < int(group) and cols % int(smaller) == 0:
            return f"{bits}-{smaller}"
    instead = TILE_FALLBACKS.get(bits) or FALLBACKS.get(format, LAST_FALLBACK)
    return instead if cols % formats()[instead].block == 0 else LAST_FALLBACK
