"""Owns a rotated model that is computed when it is read: exact in float64, nothing on disk.

What a rotation does can be measured with it before anything is written; a folder that rotate writes holds F32.
"""

from __future__ import annotations

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import OUTPUT
from rondel.converters.rotation import Rotation
from rondel.converters.stats import Stats
from rondel.quant.rotate_checks import validate
from rondel.quant.rotate_config import RotateConfig, unties_head
from rondel.quant.rotation_search import RotationSearch
from rondel.quant.rotator import Rotator
from rondel.quant.workers import Workers


class RotatedView(Checkpoint):
    """`source` after the rotations of `config`, float64 tensors; the same function to 1e-10 of the largest logit."""

    def __init__(
        self,
        source: Checkpoint,
        config: RotateConfig,
        stats: Stats | None = None,
        rotations: list[Rotation] | None = None,
    ) -> None:
        """`rotations`: those of `config`, where they have been searched for already."""
        validate(source, config, stats)
        if rotations is None:
            with Workers() as workers:
                rotations = RotationSearch(source, config, stats, workers).find().rotations
        tensors = dict(source.manifest["tensors"])
        if unties_head(source, config):
            tensors[OUTPUT] = tensors[source.head()]
        records = [rotation.to_json() for rotation in rotations]
        numbers = {**source.manifest["hyperparameters"], "tied": OUTPUT not in tensors}
        changes = {"tensors": tensors, "rotations": records, "hyperparameters": numbers}
        super().__init__(source.root, {**source.manifest, **changes})
        self._view_of, self._applied = source, rotations

    def read_rotations(self) -> list[Rotation]:
        """The changes of basis with their matrices."""
        return self._applied

    def read(self, name: str) -> torch.Tensor:
        """A rotated tensor, float64."""
        self.info(name)
        with Workers() as workers:
            return Rotator(self._view_of, self._applied, workers, dtype=torch.float64).tensor(name)
