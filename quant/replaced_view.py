"""Owns a model of which some tensors are replaced when it is read: the tuned copy, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.folder import PLAIN_FORMATS, Packed, sha256_of
from rondel.converters.manifest import TensorInfo


class ReplacedView(Checkpoint):
    """`source` with other bytes or numbers in the place of some tensors, of the same formats and shapes.

    Float tensors may come in another precision; they are kept in the one that `source` stores.
    """

    shareable = False  # its files hold what is replaced

    def __init__(self, source: Checkpoint, replaced: Mapping[str, Packed | torch.Tensor]) -> None:
        super().__init__(source.root, source.manifest)
        self._view_of = source
        self._replaced: dict[str, Packed | torch.Tensor] = {}
        dtypes = {form: dtype for dtype, form in PLAIN_FORMATS.items()}
        for name, given in replaced.items():
            info = source.info(name)
            tensor = given if isinstance(given, Packed) else given.to(dtypes[info.format])
            form = tensor.format if isinstance(tensor, Packed) else PLAIN_FORMATS[tensor.dtype]
            assert (form, tuple(tensor.shape)) == (info.format, info.shape), f"{name}: of another format or shape"
            self._replaced[name] = tensor
        self._hashes = {
            name: sha256_of(one.data if isinstance(one, Packed) else one) for name, one in self._replaced.items()
        }

    def changed(self, names: list[str]) -> bool:
        """Whether any of these tensors is replaced."""
        return any(name in self._replaced for name in names)

    def info(self, name: str) -> TensorInfo:
        """Shape, format, place and hash of a tensor, replaced or not."""
        found = self._view_of.info(name)
        return replace(found, sha256=self._hashes[name]) if name in self._hashes else found

    def read(self, name: str) -> torch.Tensor:
        """A float tensor, replaced or not."""
        found = self._replaced.get(name)
        if isinstance(found, Packed):
            raise RondelError(f"{self.root}: {name} is quantized ({found.format}), a float tensor is needed here")
        return self._view_of.read(name) if found is None else found

    def packed(self, name: str) -> Packed:
        """A quantized tensor's bytes, replaced or not."""
        found = self._replaced.get(name)
        return found if isinstance(found, Packed) else self._view_of.packed(name)
