"""Models whose residual stream stands in a basis of the test's choice, and nothing in them says so."""

from __future__ import annotations

from pathlib import Path

import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.family import EMBEDDING, OUTPUT
from rondel.converters.output import StageOutput
from rondel.quant.orthogonal import with_matrix
from rondel.quant.rotate_config import RotateConfig, rotations_of
from rondel.quant.rotator import Rotator
from rondel.quant.workers import Workers


def turned(source: Checkpoint, matrix: torch.Tensor, out: Path) -> Checkpoint:
    """The model with its stream turned by a matrix (width, width); gains are folded and the head is untied."""
    (start,) = rotations_of(source, RotateConfig(heads=False))
    record = {"name": "turned", "version": "0", "config": {}, "inputs": {}}
    output, shards = StageOutput(out, record), source.shards()
    shards["output"] = [*(name for name in shards["output"] if name != OUTPUT), OUTPUT]
    with Workers(1) as workers:
        rotator = Rotator(source, [with_matrix(start, matrix[None])], workers)
        for shard, names in shards.items():
            output.write(shard, {name: rotator.tensor(name) for name in names})
    carried = source.carried()
    numbers = {**carried["hyperparameters"], "tied": False}
    output.finish(list(shards), {**carried, "hyperparameters": numbers, "stages": [record]}, source.side_files())
    return open_checkpoint(out)


def principal_axes(source: Checkpoint) -> torch.Tensor:
    """The axes of the embedding's second moment (width, width), the largest first: a few enormous channels."""
    embedding = source.read_float(EMBEDDING, torch.float64)
    return torch.linalg.eigh(embedding.T @ embedding).eigenvectors.flip(1).contiguous()
