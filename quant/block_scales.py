"""Owns the float16 scales of packed blocks as numbers that can be fitted: every weight is linear in them.

W = d A + m B on each block of columns, with d and m the block's own float16 numbers (m where a format has it) and A, B
what the codes and the block's inner scales say. A and B come from the decoder: once with d = 1, m = 0, once with the
opposite. Folding new numbers back changes the scale fields alone, so that format and size stay as they are.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from rondel.converters.folder import Packed
from rondel.converters.ggml_types import GGML_TYPES
from rondel.converters.row_gains import SCALE_OFFSETS
from rondel.converters.tiles import PANEL_ROWS, TILE_FORMATS
from rondel.native.formats import decode

LARGEST = float(np.finfo(np.float16).max)


def has_scales(format: str) -> bool:
    """Whether blocks of a format are linear in float16 numbers of their own."""
    return format in SCALE_OFFSETS or format in TILE_FORMATS


class BlockScales:
    """The scales of one packed matrix (rows, cols), and the weights that other scales would give.

    `scales` (count, rows, blocks) float32 are the recorded ones: d, and m where the format has it.
    """

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.rows, self.cols = packed.shape
        self._bytes = packed.data.numpy()
        fields = [self._field(number) for number in range(self._count())]
        self.scales = torch.from_numpy(np.stack([field.astype(np.float32) for field in fields]))
        self.blocks = self.scales.shape[2]

    @cached_property
    def parts(self) -> torch.Tensor:
        """A and B, (count, rows, blocks, columns of a block)."""
        return torch.stack([self._part(number) for number in range(self._count())])

    def weight(self, scales: torch.Tensor) -> torch.Tensor:
        """The matrix (rows, cols) with other scales (count, rows, blocks); differentiable in them."""
        return (self.parts * scales[..., None]).sum(0).reshape(self.rows, self.cols)

    def fold(self, scales: torch.Tensor) -> Packed:
        """The packed matrix with other scales, rounded to float16; what float16 cannot hold is cut to its largest."""
        halves = scales.detach().cpu().float().clamp(-LARGEST, LARGEST).numpy().astype("<f2")
        if not np.isfinite(halves).all():
            raise ValueError("a scale that is no number cannot be stored")
        return Packed(torch.from_numpy(self._with(halves)), self.packed.format, self.packed.shape)

    def _count(self) -> int:
        return 1 if self.packed.format in TILE_FORMATS else len(SCALE_OFFSETS[self.packed.format])

    def _frames(self, data: np.ndarray) -> np.ndarray:
        """The bytes of each block (rows, blocks, bytes), or of each group of a panel's rows (panels, groups, bytes)."""
        tile = TILE_FORMATS.get(self.packed.format)
        if tile:
            return data.reshape(-(-self.rows // PANEL_ROWS), self.cols // tile.group, -1)
        return data.reshape(self.rows, -1, GGML_TYPES[self.packed.format].bytes)

    def _field(self, number: int) -> np.ndarray:
        """The recorded scales number `number`, (rows, blocks) float16."""
        frames = self._frames(self._bytes)
        if self.packed.format in TILE_FORMATS:
            halves = np.ascontiguousarray(frames[..., -2 * PANEL_ROWS :]).view("<f2").transpose(0, 2, 1)
            return halves.reshape(-1, halves.shape[2])[: self.rows]
        offset = SCALE_OFFSETS[self.packed.format][number]
        return np.ascontiguousarray(frames[..., offset : offset + 2]).view("<f2")[..., 0]

    def _with(self, halves: np.ndarray) -> np.ndarray:
        """The bytes with the scales (count, rows, blocks) float16."""
        data = self._bytes.copy()
        frames = self._frames(data)
        if self.packed.format in TILE_FORMATS:
            padded = np.pad(halves[0], ((0, frames.shape[0] * PANEL_ROWS - self.rows), (0, 0)))
            panels = padded.reshape(-1, PANEL_ROWS, frames.shape[1]).transpose(0, 2, 1)
            frames[..., -2 * PANEL_ROWS :] = np.ascontiguousarray(panels).view(np.uint8)
        else:
            for offset, one in zip(SCALE_OFFSETS[self.packed.format], halves, strict=True):
                frames[..., offset : offset + 2] = np.ascontiguousarray(one)[..., None].view(np.uint8)
        return data

    def _part(self, number: int) -> torch.Tensor:
        """What scale `number` multiplies, (rows, blocks, columns of a block)."""
        alone = np.zeros((self._count(), self.rows, self.blocks), "<f2")
        alone[number] = 1
        decoded = decode(self.packed.format, self._with(alone), self.rows, self.cols)
        return torch.from_numpy(decoded.reshape(self.rows, self.blocks, -1))
