"""Owns what each matrix of a quantized student lacks: how it differs from its teacher's, and how much that counts.

Both are read off the same windows: the second moment of what a matrix reads, and the gradient of the divergence by the
matrix, by which small changes of different matrices can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rondel.converters.family import block_tensor
from rondel.quant.descent import divergence
from rondel.quant.student import Student, Values, Weights
from rondel.quant.workers import Workers

LARGEST_ERROR = 0.9  # of the teacher's norm: beyond, the matrices stand in two bases and their difference means nothing


@dataclass(frozen=True)
class Deficit:
    """One matrix W0 of a student whose teacher has W, both (rows, cols) float32."""

    stored: torch.Tensor  # W0
    missing: torch.Tensor  # W - W0
    moment: torch.Tensor  # (cols, cols) float64: the mean of x x^T of its inputs
    gradient: torch.Tensor  # (rows, cols): of the mean divergence, nats a token

    @property
    def wanted(self) -> torch.Tensor:
        """W (rows, cols)."""
        return (self.stored + self.missing).contiguous()

    def missed(self, weights: torch.Tensor) -> float:
        """The mean squared error of the outputs that `weights` give in the place of W."""
        error = (self.wanted - weights).double()
        return float(((error @ self.moment.double()) * error).sum())

    def gain(self, change: torch.Tensor) -> float:
        """How much nearer the student comes to its teacher if `change` is added, in nats a token, to first order."""
        return -float((self.gradient.double() * change.double()).sum())


class _Watched(Student):
    """A student that adds up the second moments of what its linears read."""

    def __init__(self, student: Student, roles: Sequence[str]) -> None:
        self.__dict__.update(student.__dict__)  # the same tensors: nothing is decoded again
        self._roles = roles
        self.moments: dict[str, torch.Tensor] = {}

    def _linear(self, layer: int, role: str, x: torch.Tensor, weights: Weights | None, values: Values) -> torch.Tensor:
        if role in self._roles:
            rows = x.detach().flatten(0, -2)
            name = block_tensor(layer, role)
            self.moments[name] = self.moments.get(name, 0) + (rows.T @ rows).double()
        return super()._linear(layer, role, x, weights, values)


def input_moments(student: Student, windows: torch.Tensor, workers: Workers) -> dict[str, torch.Tensor]:
    """The mean of x x^T (cols, cols) float64 of what every matrix of a block reads, over token windows (n, context).

    Matrices that read one site share the tensor.
    """
    family = student.source.family
    first = {site: family.readers(site)[0].role for site in family.sites}

    def measure(window: int) -> dict[str, torch.Tensor]:
        watched = _Watched(student, list(first.values()))
        with torch.no_grad():
            watched.run(watched.embed(windows[window][None]))
        return watched.moments

    totals: dict[str, torch.Tensor] = {}
    for found in workers.map(measure, range(len(windows))):
        for name, moment in found.items():
            totals[name] = totals[name] + moment if name in totals else moment
    means = {name: total / windows.numel() for name, total in totals.items()}
    return {
        block_tensor(layer, linear.role): means[block_tensor(layer, first[linear.reads])]
        for layer in range(student.layers)
        for linear in family.linears
        if block_tensor(layer, linear.role) in student.tensors
    }


def gradients(
    student: Student, teacher: Student, windows: torch.Tensor, names: Sequence[str], workers: Workers
) -> dict[str, torch.Tensor]:
    """The gradient of the mean divergence from the teacher by each of the tensors `names`."""

    def measure(window: int) -> tuple[torch.Tensor, ...]:
        tokens = windows[window][None]
        leaves = {name: student.tensors[name].detach().requires_grad_() for name in names}
        with torch.no_grad():
            wanted = teacher.logits(tokens)
        with torch.enable_grad():
            loss = divergence(student.logits(tokens, weights=leaves), wanted)
            return torch.autograd.grad(loss, list(leaves.values()))

    totals = [torch.zeros_like(student.tensors[name]) for name in names]
    for found in workers.map(measure, range(len(windows))):
        for place, gradient in enumerate(found):
            totals[place] += gradient / len(windows)
    return dict(zip(names, totals, strict=True))


def wanted_weight(student: Student, teacher: Student, layer: int, role: str) -> torch.Tensor:
    """The teacher's matrix behind the student's norm: W diag(g / g0), where a norm makes what the matrix reads."""
    weight = teacher.weight(layer, role)
    norm = student.source.family.norm_making(student.source.family.linear(role).reads)
    if norm is None or norm.reads != "residual":
        return weight
    own, other = (model.norm(layer, norm.role) for model in (student, teacher))
    return weight * torch.where(own == 0, torch.ones_like(own), other / own)


def deficits(student: Student, teacher: Student, windows: torch.Tensor, workers: Workers) -> dict[str, Deficit]:
    """The deficit of every matrix of a block by tensor name, from token windows (n, context).

    Matrices that cannot be compared are left out, all of them where the teacher has another depth.
    """
    if teacher.layers != student.layers:
        return {}
    moments = input_moments(student, windows, workers)
    missing = {}
    for name in moments:
        _, layer, role, _ = name.split(".")
        if student.source.info(name).packed and teacher.tensors[name].shape == student.tensors[name].shape:
            wanted = wanted_weight(student, teacher, int(layer), role)
            error = wanted - student.tensors[name]
            if error.norm() < LARGEST_ERROR * wanted.norm():
                missing[name] = error
    found = gradients(student, teacher, windows, list(missing), workers) if missing else {}
    return {name: Deficit(student.tensors[name], missing[name], moments[name], found[name]) for name in missing}
