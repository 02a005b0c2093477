"""Owns codes that are vectors: the codewords of ggml's IQ2 and IQ3 formats, and the nearest one to any vector.

A codeword is four or eight magnitudes from a table, and eight weights share eight signs. Where a format stores seven
of them, the eighth makes the number of minus signs even. The tables come from the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from rondel.converters.folder import Packed
from rondel.converters.ggml_types import GGML_TYPES
from rondel.converters.row_gains import SCALE_OFFSETS
from rondel.native.formats import decode
from rondel.quant.block_layouts import Field, codeword_fields

SIGNED = 8  # weights that share a field of signs
AT_ONCE = 1 << 25  # distances in memory at a time: 128 MiB


@dataclass(frozen=True)
class Codebook:
    """The codewords of a format: magnitudes (words, depth) where every scale is one."""

    format: str
    words: torch.Tensor
    index: Field
    signs: Field

    @property
    def even(self) -> bool:
        """Whether the number of minus signs of eight weights must be even."""
        return self.signs.bits.shape[1] < SIGNED

    @property
    def safe(self) -> float:
        """No vector nearer than this to a codeword has another one nearer: half the least distance of two."""
        distances = torch.cdist(self.words, self.words) + torch.eye(len(self.words)) * 1e9
        turned = 2 * float(self.words.min()) * (2**0.5 if self.even else 1)
        return min(float(distances.min()), turned) / 2

    @property
    def step(self) -> float:
        """The mean distance of neighbouring magnitudes: what a step is to whole numbers."""
        levels = self.words.unique()
        return float((levels[-1] - levels[0]) / (len(levels) - 1))

    def read(self, packed: Packed) -> torch.Tensor:
        """The codewords of a matrix with their signs, (eights, 8)."""
        blocks = packed.data.numpy().reshape(-1, GGML_TYPES[self.format].bytes)
        index = torch.from_numpy(self.index.read(blocks)).long()
        signs = torch.from_numpy(self.signs.read(blocks)).reshape(-1, 1) >> torch.arange(SIGNED) & 1
        if self.even:
            signs[:, -1] = signs[:, :-1].sum(1) & 1
        return self.words[index.reshape(-1)].reshape(-1, SIGNED) * (1 - 2 * signs)

    def nearest(self, vectors: torch.Tensor) -> torch.Tensor:
        """The codewords with signs nearest to vectors (eights, 8)."""
        minus = vectors < 0
        if self.even:
            odd = (minus.sum(1) & 1).bool()
            weakest = torch.nn.functional.one_hot(vectors.abs().argmin(1), SIGNED).bool()
            minus = minus ^ (weakest & odd[:, None])
        signs = 1.0 - 2.0 * minus.to(vectors.dtype)
        upright = (vectors * signs).reshape(-1, self.words.shape[1])
        words = self.words.to(vectors)
        offset = words.square().sum(1) / 2
        rows = AT_ONCE // len(words)
        found = [(part @ words.T).sub_(offset).argmax(1) for part in upright.split(rows)]
        return words[torch.cat(found)].reshape(-1, SIGNED) * signs if found else vectors

    def write(self, packed: Packed, chosen: torch.Tensor) -> Packed:
        """The matrix with other codewords, (eights, 8) with signs."""
        data = packed.data.numpy().copy()
        blocks = data.reshape(-1, GGML_TYPES[self.format].bytes)
        chosen = chosen.cpu().float()
        keys = {word.numpy().tobytes(): number for number, word in enumerate(self.words)}
        magnitudes = chosen.abs().reshape(-1, self.words.shape[1]).numpy()
        distinct, inverse = np.unique(magnitudes, axis=0, return_inverse=True)
        index = np.array([keys[word.tobytes()] for word in distinct], np.int32)[inverse.reshape(-1)]
        self.index.write(blocks, index.reshape(len(blocks), -1))
        stored = self.signs.bits.shape[1]
        minus = (chosen[:, :stored] < 0).int() << torch.arange(stored, dtype=torch.int32)
        self.signs.write(blocks, minus.sum(1, dtype=torch.int32).numpy().reshape(len(blocks), -1))
        return Packed(torch.from_numpy(data), packed.format, packed.shape)


@cache
def codebook(format: str) -> Codebook | None:
    """The codebook of a format, or None."""
    fields = codeword_fields().get(format)
    if fields is None:
        return None
    index, signs, unit = fields
    kind, count = GGML_TYPES[format], len(index.bits)
    blocks = np.zeros((-(-(index.top + 1) // count), kind.bytes), np.uint8)
    for offset in SCALE_OFFSETS[format]:
        blocks[:, offset : offset + 2] = np.array([1], "<f2").view(np.uint8)
    index.write(blocks, np.arange(len(blocks) * count, dtype=np.int32).reshape(len(blocks), count) % (index.top + 1))
    weights = decode(format, blocks.reshape(-1), len(blocks), kind.block).reshape(len(blocks) * count, -1)
    return Codebook(format, torch.from_numpy(weights[: index.top + 1] / np.float32(unit)), index, signs)
