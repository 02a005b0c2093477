"""Owns the tuning of the single copy: scales and norms of a quantized model, fitted to its teacher's logits.

Block codes stay as they are. What each block is proportional to, and the gains of the norms, are multiplied by factors
that Adam fits from one: the same formats and the same bytes, so that whatever copies add later is measured against a
model that has had the same care (compare the step sizes of EfficientQAT, Chen et al. 2024, and Norm Tweaking, Li et al.
2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.folder import Packed
from rondel.quant.block_scales import BlockScales, has_scales
from rondel.quant.descent import Leaf, batches, descend, divergence, open_workers
from rondel.quant.judgement import RememberedTeacher, Splits, token_losses
from rondel.quant.student import Student
from rondel.quant.workers import Workers

RATE = 2e-3  # Adam's, of factors near one
BATCH = 4  # windows a step


class TuneConfig(Protocol):
    """What of a ReplicateConfig the tuning follows."""

    @property
    def steps(self) -> int:
        """Of the descent."""
        ...

    @property
    def seed(self) -> int:
        """Of the windows' order."""
        ...


@dataclass(frozen=True)
class Tuned:
    """The tensors that changed, as they are stored and as they are computed with; nothing where tuning did not help."""

    data: Mapping[str, torch.Tensor | Packed]
    weights: Mapping[str, torch.Tensor]
    report: dict[str, Any]


class _Factors:
    """A factor of one for every block scale and norm gain of a model, and the weights that they give."""

    def __init__(self, source: Checkpoint, student: Student) -> None:
        self.student = student
        self.blocks: dict[str, BlockScales] = {}
        self.leaves: dict[str, torch.Tensor] = {}
        for name in source.names():
            if has_scales(source.info(name).format):
                self.blocks[name] = BlockScales(source.packed(name)).to(student.device, student.dtype)
                self.leaves[name] = torch.ones_like(self.blocks[name].scales)
            elif name.endswith("norm.weight"):
                self.leaves[name] = torch.ones_like(student.tensors[name])

    def weights(self) -> dict[str, torch.Tensor]:
        """What stands in the place of the recorded tensors; differentiable in the factors."""
        return {
            name: self.blocks[name].weight(self.blocks[name].scales * factor)
            if name in self.blocks
            else self.student.tensors[name] * factor
            for name, factor in self.leaves.items()
        }

    def stored(self) -> dict[str, torch.Tensor | Packed]:
        """The tensors with the factors folded in, as they are stored."""
        return {
            name: self.blocks[name].fold(self.blocks[name].scales * factor)
            if name in self.blocks
            else (self.student.tensors[name] * factor).float().cpu()
            for name, factor in self.leaves.items()
        }


def tune(
    source: Checkpoint,
    student: Student,
    teacher: Student,
    splits: Splits,
    config: TuneConfig,
    *,
    workers: Workers | None = None,
) -> Tuned:
    """Fit the factors on `splits.fit`; they are kept only if they help on `splits.select`, which fitted nothing.

    `student` is the forward pass of `source`. The same bits for any number of workers.
    """
    remembered, factors = RememberedTeacher(teacher), _Factors(source, student)

    def loss(window: int) -> torch.Tensor:
        tokens = splits.fit[window][None]
        return divergence(student.logits(tokens, weights=factors.weights()), remembered.logits(tokens))

    with open_workers(workers) as crew:
        plan = batches(len(splits.fit), config.steps, BATCH, config.seed)
        descend([Leaf(factor, RATE) for factor in factors.leaves.values()], loss, plan, crew)
    stored = factors.stored()
    weights = {
        name: BlockScales(value).weight(BlockScales(value).scales).to(student.device, student.dtype)
        if isinstance(value, Packed)
        else value.to(student.device, student.dtype)
        for name, value in stored.items()
    }
    before = token_losses(student, remembered, splits.select).told()
    after = token_losses(student, remembered, splits.select, weights=weights).told()
    report = {"before": before, "after": after, "kept": after["kl"] < before["kl"]}
    return Tuned(stored, weights, report) if report["kept"] else Tuned({}, {}, report)
