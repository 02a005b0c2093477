"""Owns the tuning of the single copy: a quantized model's own numbers, fitted to its teacher's logits.

Block scales and the gains of norms are multiplied by factors that start from one; codes and inner scales move to their
neighbours where the gradient insists (fitted_matrix.py). The formats and the bytes stay the same, so that whatever
copies add later is measured against a model that has had the same care (compare EfficientQAT, Chen et al. 2024; Norm
Tweaking, Li et al. 2023; LLM-QAT, Liu et al. 2023). Copies that are there already can be in place, and are tuned too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.folder import Packed
from rondel.converters.progress import Progress, silent
from rondel.converters.replication import Replication
from rondel.native.formats import decode
from rondel.quant.block_scales import has_scales
from rondel.quant.descent import DescentConfig, Leaf, batches, descend_through, divergence, open_workers
from rondel.quant.distill import fitted_leaves, halves, opening_sets, with_sets
from rondel.quant.fitted_matrix import FittedMatrix, Rates
from rondel.quant.judgement import RememberedTeacher, Splits, token_losses
from rondel.quant.student import Student
from rondel.quant.workers import Workers

RATES = Rates(factors=1e-3, codes=2e-2, inner=2e-2)  # Adam's: a code has to be pushed for dozens of steps
NORM_RATE = 5e-4
BATCH = 4  # windows a step
LABEL_STEPS = 5  # one step in so many more follows, of the norms alone, on the text itself beside the teacher
LABEL_SHARE = 0.1  # of the loss in them: a token is a far noisier target than a distribution
LABEL_RATE = 1e-3


@dataclass(frozen=True)
class Tuned:
    """The tensors that changed, as they are stored and as they are computed with; nothing where tuning did not help."""

    data: Mapping[str, torch.Tensor | Packed]
    weights: Mapping[str, torch.Tensor]
    report: dict[str, Any]
    copies: Replication | None = None  # those that were in place, with their parameters


class _Fit:
    """Everything of a model that is fitted, and the weights that it gives."""

    def __init__(self, source: Checkpoint, student: Student, copies: Replication | None) -> None:
        self.student, self._copies = student, copies
        self.matrices: dict[str, FittedMatrix] = {}
        self.norms: dict[str, torch.Tensor] = {}
        self._sets = opening_sets(student, copies, copies.sets) if copies else []
        for name in source.names():
            if has_scales(source.info(name).format):
                self.matrices[name] = FittedMatrix(source.packed(name), student.device, student.dtype)
            elif name.endswith("norm.weight"):
                self.norms[name] = torch.ones_like(student.tensors[name])

    def leaves(self) -> list[Leaf]:
        """All that the descent moves."""
        norms = [Leaf(gain, NORM_RATE) for gain in self.norms.values()]
        matrices = [leaf for matrix in self.matrices.values() for leaf in matrix.leaves(RATES)]
        return [*matrices, *norms, *fitted_leaves(self._sets)]

    def made(self) -> dict[str, torch.Tensor]:
        """What stands in the place of the recorded tensors, and copies' parameters; differentiable in the leaves."""
        matrices = {name: matrix.weight() for name, matrix in self.matrices.items()}
        norms = {name: self.student.tensors[name] * gain for name, gain in self.norms.items()}
        sets = {_place(number, kind): values for number, one in enumerate(self._sets) for kind, values in one.items()}
        return matrices | norms | sets

    def logits(self, tokens: torch.Tensor, made: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits (b, n, vocabulary) of token ids (b, n) with what was made."""
        sets = [{kind: made[_place(number, kind)] for kind in one} for number, one in enumerate(self._sets)]
        return self.student.logits(tokens, self._copies, sets, made)

    def bound(self) -> None:
        """Keep whole numbers within their formats."""
        for matrix in self.matrices.values():
            matrix.bound()

    def stored(self) -> dict[str, torch.Tensor | Packed]:
        """The tensors as they are stored."""
        norms = {name: (self.student.tensors[name] * gain).float().cpu() for name, gain in self.norms.items()}
        return {name: matrix.stored() for name, matrix in self.matrices.items()} | norms

    def copies(self) -> Replication | None:
        """The copies as they are stored."""
        return with_sets(self._copies, halves(self._sets)) if self._copies else None


def _place(number: int, kind: str) -> str:
    """The name of a parameter of copies beside those of tensors."""
    return f"copies.{number}.{kind}"


def tune(
    source: Checkpoint,
    student: Student,
    teacher: Student,
    splits: Splits,
    config: DescentConfig,
    *,
    copies: Replication | None = None,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> Tuned:
    """Fit on `splits.fit`; the result is kept only if it helps on `splits.select`, which fitted nothing.

    `student` is the forward pass of `source`; `copies`, with fitted parameters, run in it and are fitted as well. The
    same bits for any number of workers. Codes take 16 bytes a weight beside the float32 weights of both models.
    """
    remembered, fit = RememberedTeacher(teacher), _Fit(source, student, copies)
    what = "tuning the single copy with copies in place" if copies else "tuning the single copy"

    def loss(window: int, made: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tokens = splits.fit[window][None]
        return divergence(fit.logits(tokens, made), remembered.logits(tokens))

    def after(step: int, _: float) -> bool:
        fit.bound()
        progress(step + 1, config.steps, what)
        return True

    def losses(path: Replication | None, weights: Mapping[str, torch.Tensor] | None = None) -> dict[str, float]:
        return token_losses(student, remembered, splits.select, path, weights=weights).told()

    with open_workers(workers) as crew:
        plan = batches(len(splits.fit), config.steps, BATCH, config.seed)
        descend_through(fit.leaves(), fit.made, loss, plan, crew, after)
        stored, fitted = fit.stored(), fit.copies()
        weights = {name: _computed(value).to(student.device, student.dtype) for name, value in stored.items()}
        before = losses(copies)
        taught = tuned = losses(fitted, weights)
        norms = _towards_text(student, remembered, splits, config, weights, list(fit.norms), fitted, crew)
        nearer = losses(fitted, weights | norms)
    labels = nearer["nll"] + nearer["kl"] < taught["nll"] + taught["kl"]  # the text is as welcome as the teacher
    if labels:
        tuned, weights = nearer, weights | norms
        stored |= {name: norm.float().cpu() for name, norm in norms.items()}
    report = {
        "before": before,
        "taught": taught,
        "after": tuned,
        "labels": labels,
        "by_text": _by_text(before["nll"], taught["nll"], tuned["nll"]),
        "kept": tuned["kl"] < before["kl"],
    }
    return Tuned(stored, weights, report, fitted) if report["kept"] else Tuned({}, {}, report, copies)


def _by_text(before: float, taught: float, after: float) -> float:
    """Which share of the likelihood won came with the steps towards the text: the teacher may lack that too."""
    return min(max((taught - after) / (before - after), 0.0), 1.0) if after < before else 0.0


def _towards_text(  # noqa: PLR0917 (two models, the text, what is tuned already, and who works)
    student: Student,
    teacher: RememberedTeacher,
    splits: Splits,
    config: DescentConfig,
    weights: Mapping[str, torch.Tensor],
    names: Sequence[str],
    copies: Replication | None,
    crew: Workers,
) -> dict[str, torch.Tensor]:
    """The norms after some steps on the divergence and a share of the text's own negative log-likelihood.

    Divergence alone comes nearer to the teacher, and may move what is left of the error against the text. A few steps
    on both win back several times as much likelihood as they lose divergence; norms alone have too few numbers to
    learn the text by heart.
    """
    gains = {name: torch.ones_like(weights[name]) for name in names}

    def loss(window: int, norms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tokens = splits.fit[window][None]
        logits = student.logits(tokens, copies, weights={**weights, **norms})
        likelihood = cross_entropy(logits[0, :-1], tokens[0, 1:].to(student.device))
        return (1 - LABEL_SHARE) * divergence(logits, teacher.logits(tokens)) + LABEL_SHARE * likelihood

    plan = batches(len(splits.fit), config.steps // LABEL_STEPS, BATCH, config.seed + 1)
    leaves = [Leaf(gain, LABEL_RATE) for gain in gains.values()]
    descend_through(leaves, lambda: {name: weights[name] * gain for name, gain in gains.items()}, loss, plan, crew)
    return {name: weights[name] * gain for name, gain in gains.items()}


def _computed(value: torch.Tensor | Packed) -> torch.Tensor:
    """The numbers that a reader of the file has."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.from_numpy(decode(value.format, value.data.numpy(), *value.shape)).reshape(value.shape)
