"""Owns where ggml's blocks keep their whole numbers, bit by bit: codes, and the inner scales and mins of large blocks.

Each field is a table of bit positions, so that reading and writing are one rule for all formats, and writing what was
read gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.intp]


@dataclass(frozen=True)
class Field:
    """Whole numbers 0..top of a block; number i stands in the bits `bits[i]`, lowest first; it means unit (n + zero).

    `signed`: two's complement, whose top bit is stored inverted from what n has.
    """

    bits: Positions  # (numbers, bits) within the block: 8 byte + bit
    zero: float = 0.0
    unit: float = 1.0
    signed: bool = False
    below: int = 0  # how many of the largest numbers encoders leave unused

    @property
    def top(self) -> int:
        """The largest number."""
        return (1 << self.bits.shape[1]) - 1 - self.below

    def read(self, blocks: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The numbers (n, numbers) of blocks (n, bytes)."""
        stored = blocks[:, self.bits >> 3] >> (self.bits & 7).astype(np.uint8) & 1
        numbers = (stored.astype(np.int32) << np.arange(self.bits.shape[1])).sum(2, dtype=np.int32)
        return numbers ^ self._inverted()

    def write(self, blocks: NDArray[np.uint8], numbers: NDArray[np.int32]) -> None:
        """Put numbers (n, numbers) into blocks (n, bytes); all other bits stay."""
        numbers = numbers ^ self._inverted()
        for place in range(self.bits.shape[1]):
            byte, bit = self.bits[:, place] >> 3, (self.bits[:, place] & 7).astype(np.uint8)
            wanted = (numbers >> place & 1).astype(np.uint8) << bit
            for first in _distinct(byte):
                kept = blocks[:, byte[first]] & ~(np.uint8(1) << bit[first])
                blocks[:, byte[first]] = kept | wanted[:, first]

    def _inverted(self) -> int:
        return 1 << self.bits.shape[1] - 1 if self.signed else 0


@dataclass(frozen=True)
class Layout:
    """weight = d scale code - m min, with a scale and a min for each run of columns.

    Without scales a scale is one; a format that has m and no mins adds m itself; without a field of codes, a code is
    what the format's codebook says.
    """

    codes: Field | None
    scales: Field | None = None
    mins: Field | None = None


def _distinct(byte: Positions) -> list[Positions]:
    """Indices in sets within which no byte comes twice: each set can be written at once."""
    order = np.argsort(byte, kind="stable")
    runs = np.diff(np.r_[np.flatnonzero(np.r_[True, np.diff(byte[order]) != 0]), len(byte)])
    rank = np.empty(len(byte), np.intp)
    rank[order] = np.concatenate([np.arange(run) for run in runs])
    return [np.flatnonzero(rank == number) for number in range(rank.max() + 1)]


def _at(byte: Positions | int, bit: Positions | int, count: int) -> Positions:
    """Fields of `count` neighbouring bits that begin at a bit of a byte."""
    return np.asarray(8 * np.asarray(byte) + bit, np.intp)[..., None] + np.arange(count, dtype=np.intp)


def _nibbles(first: int) -> Positions:
    """32 codes in 16 bytes: the second half of the columns in the high nibbles."""
    column = np.arange(32)
    return _at(first + column % 16, column // 16 * 4, 4)


def _planes(first: int, bits: int) -> Positions:
    """256 codes of two or four bits: runs of 32 columns share 32 bytes."""
    column, run = np.arange(256), 256 // bits
    return _at(first + column // run * 32 + column % 32, column % run // 32 * bits, bits)


def _high_bits(first: int) -> Positions:
    """256 single bits in 32 bytes: bit j / 32 of byte j % 32."""
    column = np.arange(256)
    return _at(first + column % 32, column // 32, 1)


def _with(low: Positions, high: Positions) -> Positions:
    return np.concatenate([low, high], 1)


def _pairs(first: int) -> tuple[Field, Field]:
    """The eight 6-bit scales and mins of Q4_K and Q5_K in 12 bytes."""
    four = np.arange(4)
    scales = [_at(first + four, 0, 6), _with(_at(first + 8 + four, 0, 4), _at(first + four, 6, 2))]
    mins = [_at(first + 4 + four, 0, 6), _with(_at(first + 8 + four, 4, 4), _at(first + 4 + four, 6, 2))]
    return Field(np.concatenate(scales)), Field(np.concatenate(mins))


def _scales_q3_k() -> Field:
    i = np.arange(16)
    return Field(_with(_at(96 + i % 8, i // 8 * 4, 4), _at(104 + i % 4, i // 4 * 2, 2)), -32)


def _codes_q6_k() -> Positions:
    column = np.arange(256)
    half, t, lane = column // 128, column % 128 // 32, column % 32
    return _with(_at(half * 64 + t % 2 * 32 + lane, t // 2 * 4, 4), _at(128 + half * 32 + lane, t * 2, 2))


@cache
def layouts() -> dict[str, Layout]:
    """The layouts of the formats whose codes or inner scales stand in bits of their own."""
    eight, sixteen, fifth = np.arange(8), np.arange(16), np.arange(32)
    high = _at(2 + fifth // 8, fifth % 8, 1), _at(4 + fifth // 8, fifth % 8, 1)
    return {
        "Q4_0": Layout(Field(_nibbles(2), -8)),
        "Q4_1": Layout(Field(_nibbles(4))),
        "Q5_0": Layout(Field(_with(_nibbles(6), high[0]), -16)),
        "Q5_1": Layout(Field(_with(_nibbles(8), high[1]))),
        "Q8_0": Layout(Field(_at(2 + fifth, 0, 8), -128, signed=True)),
        "Q2_K": Layout(Field(_planes(16, 2)), Field(_at(sixteen, 0, 4)), Field(_at(sixteen, 4, 4))),
        "Q3_K": Layout(Field(_with(_planes(32, 2), _high_bits(0)), -4), _scales_q3_k()),
        "Q4_K": Layout(Field(_planes(16, 4)), *_pairs(4)),
        "Q5_K": Layout(Field(_with(_planes(48, 4), _high_bits(16))), *_pairs(4)),
        "Q6_K": Layout(Field(_codes_q6_k(), -32), Field(_at(192 + sixteen, 0, 8), -128, signed=True)),
        "TQ2_0": Layout(Field(_planes(0, 2), -1, below=1)),
        "Q1_0": Layout(Field(_at(2 + np.arange(128) // 8, np.arange(128) % 8, 1), -0.5, 2)),
        "Q2_0": Layout(Field(_at(2 + np.arange(64) // 4, np.arange(64) % 4 * 2, 2), -1)),
        "IQ4_XS": Layout(
            None, Field(_with(_at(4 + eight // 2, eight % 2 * 4, 4), _at(2 + eight // 4, eight % 4 * 2, 2)), -32)
        ),
        "IQ3_XXS": Layout(None, Field(_at(69 + 4 * eight, 4, 4), 0.5, 0.5)),
        "IQ3_S": Layout(None, Field(_at(106 + eight // 2, eight % 2 * 4, 4), 0.5, 2)),
        "IQ2_XXS": Layout(None, Field(_at(9 + 8 * eight, 4, 4), 0.5, 0.25)),
        "IQ2_XS": Layout(None, Field(_at(66 + sixteen // 2, sixteen % 2 * 4, 4), 0.5, 0.25)),
        "IQ2_S": Layout(None, Field(_at(74 + sixteen // 2, sixteen % 2 * 4, 4), 0.5, 0.25)),
        "IQ1_S": Layout(None, Field(_at(35 + 2 * eight, 4, 3), 0.5, 0.25)),
    }


@cache
def codeword_fields() -> dict[str, tuple[Field, Field, float]]:
    """Formats of codewords: their indices, the signs of eights, and what the least inner scale means."""
    word, eight = np.arange(64), np.arange(32)
    seven = eight // 4, 7 * (eight % 4)  # a word of 32 bits holds four fields of seven
    return {
        "IQ2_XXS": (Field(_at(2 + eight // 4 * 8 + eight % 4, 0, 8)), Field(_at(6 + 8 * seven[0], seven[1], 7)), 0.125),
        "IQ2_XS": (Field(_at(2 + 2 * eight, 0, 9)), Field(_at(2 + 2 * eight, 9, 7)), 0.125),
        "IQ2_S": (
            Field(_with(_at(2 + eight, 0, 8), _at(66 + eight // 4, eight % 4 * 2, 2))),
            Field(_at(34 + eight, 0, 8)),
            0.125,
        ),
        "IQ3_XXS": (Field(_at(2 + word, 0, 8)), Field(_at(66 + 4 * seven[0], seven[1], 7)), 0.25),
        "IQ3_S": (
            Field(_with(_at(2 + word, 0, 8), _at(66 + word // 8, word % 8, 1))),
            Field(_at(74 + eight, 0, 8)),
            1.0,
        ),
    }
