"""Owns the residual stream of all calibration windows between two layers: in memory, or in files where it is big."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from rondel.converters.journal import sync

FLOAT32_BYTES = 4


class HiddenStates:
    """The residual stream of all windows (windows, context, width) F32 before some layer.

    On disk there is one file a layer, so that an interrupted layer can start again, and two at most at any time.
    """

    def __init__(self, shape: tuple[int, int, int], folder: Path, budget: int) -> None:
        self.shape = shape
        self.folder = folder
        self.elements = shape[0] * shape[1] * shape[2]
        self.on_disk = self.elements * FLOAT32_BYTES > budget
        self._memory = None if self.on_disk else torch.empty(shape)

    def _path(self, layer: int) -> Path:
        return self.folder / f"before-{layer:05d}"

    def before(self, layer: int) -> torch.Tensor:
        """The states that `layer` reads. In memory there is one tensor, which every window overwrites in its place."""
        if self._memory is not None:
            return self._memory
        path = self._path(layer)
        if not self.kept(layer):
            self.folder.mkdir(exist_ok=True)
            with path.open("wb") as file:
                file.truncate(self.elements * FLOAT32_BYTES)
        states = torch.from_file(str(path), shared=True, size=self.elements, dtype=torch.float32)
        return states.reshape(self.shape)

    def kept(self, layer: int) -> bool:
        """Whether an earlier run left the states before `layer` on disk."""
        path = self._path(layer)
        return self.on_disk and path.is_file() and path.stat().st_size == self.elements * FLOAT32_BYTES

    def sync(self, layer: int) -> None:
        """Make the states before `layer` safe on disk."""
        if self.on_disk:
            sync(self._path(layer))

    def drop(self, layer: int) -> None:
        """The states before `layer` are no longer needed."""
        self._path(layer).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete what is left on disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
