"""Random packed weights of every format, made from bytes, so that every code and every sub-scale occurs."""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

from rondel.converters.tiles import TILE_FORMATS
from rondel.native.formats import format_bytes

# Where the float16 numbers of a ggml block stand (ggml-common.h's structs), and the bytes of the block.
HALVES = {
    "Q4_0": ([0], 18),
    "Q4_1": ([0, 2], 20),
    "Q5_0": ([0], 22),
    "Q5_1": ([0, 2], 24),
    "Q8_0": ([0], 34),
    "Q2_K": ([80, 82], 84),
    "Q3_K": ([108], 110),
    "Q4_K": ([0, 2], 144),
    "Q5_K": ([0, 2], 176),
    "Q6_K": ([208], 210),
    "IQ4_NL": ([0], 18),
    "IQ4_XS": ([0], 136),
    "MXFP4": ([], 17),
    "TQ1_0": ([52], 54),
    "TQ2_0": ([64], 66),
    "Q1_0": ([0], 18),
    "Q2_0": ([0], 18),
    "IQ1_S": ([0], 50),
    "IQ1_M": ([], 56),
    "IQ2_XXS": ([0], 66),
    "IQ2_XS": ([0], 74),
    "IQ2_S": ([0], 82),
    "IQ3_XXS": ([0], 98),
    "IQ3_S": ([0], 110),
}
FLOATS = ("F32", "F16", "BF16")
BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
UNLISTED = {"Q1_0": (41, 128), "Q2_0": (42, 64)}  # number and block of types that the gguf package cannot decode
GGML = (*FLOATS, *HALVES)
TILES = tuple(TILE_FORMATS)
EVERY = (*GGML, *TILES)


def block_of(name: str) -> int:
    """Columns a row must be a multiple of, from the name alone (tests compare it with the runtime's table)."""
    if name in TILES:
        return TILE_FORMATS[name].group
    if name in UNLISTED:
        return UNLISTED[name][1]
    return 1 if name in FLOATS else 32 if name in BLOCKS_OF_32 else 256


def ggml_number(name: str) -> int:
    """ggml's number of a type."""
    return UNLISTED[name][0] if name in UNLISTED else int(gguf.GGMLQuantizationType[name])


def decoded_by_reference(name: str, packed: NDArray[np.uint8], rows: int) -> NDArray[np.float32]:
    """(rows, cols) weights as the gguf package reads them; by ggml-common.h's layout where it does not."""
    if name not in UNLISTED:
        decoded: NDArray[np.float32] = gguf.quants.dequantize(packed.reshape(rows, -1), gguf.GGMLQuantizationType[name])
        return decoded
    blocks = packed.reshape(-1, HALVES[name][1])
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32)
    levels = 2 * bits - 1 if name == "Q1_0" else bits[:, ::2] + 2 * bits[:, 1::2] - 1
    return (scales * levels).reshape(rows, -1)


def half_columns(name: str, packed: NDArray[np.uint8]) -> list[NDArray[np.uint16]]:
    """Views of all float16 scales and minima in packed bytes, to be overwritten."""
    if name in TILES:
        tile = TILE_FORMATS[name]
        frame = tile.bytes(16, tile.group)
        return [packed.reshape(-1, frame)[:, frame - 32 :].view(np.uint16)]
    offsets, size = HALVES[name]
    return [packed.reshape(-1, size)[:, o : o + 2].view(np.uint16) for o in offsets]


def _bytes_of(name: str) -> int:
    return HALVES[name][1] if name in HALVES else TILE_FORMATS[name].bytes(16, TILE_FORMATS[name].group)


def random_packed(
    name: str, rows: int, cols: int, rng: np.random.Generator, *, fill: int | None = None, scale: float | None = None
) -> NDArray[np.uint8]:
    """Packed (rows, cols) weights with finite scales; `fill` sets every code byte, `scale` every float16 number."""
    size = format_bytes(name, rows, cols)
    if name in FLOATS:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        if name == "F16":
            return values.astype(np.float16).view(np.uint8).reshape(-1)
        raw = values.view(np.uint32)
        return (raw if name == "F32" else (raw >> 16).astype(np.uint16)).view(np.uint8).reshape(-1)
    packed = rng.integers(0, 256, size, dtype=np.uint8) if fill is None else np.full(size, fill, np.uint8)
    bits = rng.integers(0, 1 << 16, size // _bytes_of(name), dtype=np.uint16) & 0x8FFF | 0x3000
    if name == "IQ1_M":  # the half stands in the top nibbles of four words
        words = packed.reshape(-1, 56)[:, 48:].view(np.uint16)
        half = bits if scale is None else np.full_like(bits, np.float16(scale).view(np.uint16))
        for i in range(4):
            words[:, i] = words[:, i] & 0x0FFF | (half >> 4 * i & 15) << 12
    if name == "MXFP4":  # a power of two around one, as an exponent
        packed.reshape(-1, 17)[:, 0] = 124 + (bits & 7) if scale is None else 128
    for halves in half_columns(name, packed):
        if scale is None:  # any sign and mantissa, magnitudes around one
            halves[:] = rng.integers(0, 1 << 16, halves.shape, dtype=np.uint16) & 0x8FFF | 0x3000
        else:
            halves[:] = np.float16(scale).view(np.uint16)
    return packed
