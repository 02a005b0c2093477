"""Owns a quantized model that is decoded when it is read: what a runtime computes with, as float32 tensors."""

from __future__ import annotations

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.native.formats import decode


class DecodedView(Checkpoint):
    """A checkpoint of any formats; every tensor reads as floats."""

    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source.root, source.manifest)
        self._view_of = source

    def read(self, name: str) -> torch.Tensor:
        """A tensor, decoded where it is packed."""
        info = self._view_of.info(name)
        if not info.packed:
            return self._view_of.read(name)
        return torch.from_numpy(decode(info.format, self._view_of.packed(name).data.numpy(), *info.shape))
