"""Low-rank corrections of quantized matrices: W0 + L R, the best in what the matrix's inputs make of the error.

The optimum in the activation metric is closed: the singular value decomposition of (W - W0) S^1/2, where S is the
second moment of the inputs (QERA, Zhang et al., arXiv 2410.06040). Which matrices get how many ranks is decided by what
each rank gains of the divergence, to first order, and what it takes in bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rondel.converters.lora import HALF_BYTES
from rondel.quant.deficits import Deficit
from rondel.quant.descent import Leaf, batches, descend, divergence
from rondel.quant.student import Student
from rondel.quant.workers import Workers

DAMPING = 1e-3  # of the mean square of the inputs, added to S: directions that the windows did not show
RATE = 0.02  # Adam's, of the root mean square of a factor
BATCH = 4  # windows a step

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # tensor name -> L (rows, rank), R (rank, cols)


@dataclass(frozen=True)
class Directions:
    """What a matrix lacks as a sum of ranks, L R = left @ right of the first ones, the largest first."""

    left: torch.Tensor  # (rows, most)
    right: torch.Tensor  # (most, cols)
    gains: tuple[float, ...]  # of the divergence by each rank, nats a token, to first order
    shares: tuple[float, ...]  # of the squared error of the matrix's outputs that each rank removes

    @property
    def bytes(self) -> int:
        """Of one rank, in float16."""
        return HALF_BYTES * (len(self.left) + self.right.shape[1])


def directions(deficit: Deficit, most: int) -> Directions:
    """The `most` best ranks of one matrix (QERA's exact solution)."""
    moment = deficit.moment
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    energies, basis = torch.linalg.eigh(damped)
    root = energies.clamp_min(1e-30).sqrt()
    u, s, v = torch.linalg.svd(deficit.missing.double() @ basis * root, full_matrices=False)
    left, right = u[:, :most] * s[:most], (v[:most] / root) @ basis.T
    even = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-30)).sqrt()  # equal norms: float16 holds either
    left, right = left * even, right / even.clamp_min(1e-30)[:, None]
    gains = -(left * (deficit.gradient.double() @ right.T)).sum(0)
    shares = s[:most].square() / s.square().sum()
    return Directions(left.float(), right.float(), tuple(gains.tolist()), tuple(shares.tolist()))


def spend(found: Mapping[str, Directions], budget: int) -> dict[str, int]:
    """The ranks of each matrix: one after another where it gains most a byte, as far as the budget of bytes reaches."""
    ranks: dict[str, int] = {}
    waiting = [(-one.gains[0] / one.bytes, name) for name, one in found.items() if one.gains and one.gains[0] > 0]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        one, taken = found[name], ranks.get(name, 0)
        if one.bytes > budget:
            continue
        budget -= one.bytes
        ranks[name] = taken + 1
        if taken + 1 < len(one.gains) and one.gains[taken + 1] > 0:
            heapq.heappush(waiting, (-one.gains[taken + 1] / one.bytes, name))
    return ranks


def factors(found: Mapping[str, Directions], ranks: Mapping[str, int]) -> Factors:
    """The factors of so many ranks of each matrix."""
    return {name: (found[name].left[:, :rank], found[name].right[:rank]) for name, rank in sorted(ranks.items())}


def corrected(student: Student, chosen: Factors) -> dict[str, torch.Tensor]:
    """The student's matrices with their corrections, as weights for its methods."""
    return {name: student.tensors[name] + left @ right for name, (left, right) in chosen.items()}


def refine(
    student: Student, teacher: Student, windows: torch.Tensor, chosen: Factors, config: Any, *, workers: Workers
) -> Factors:
    """The factors after `config.steps` steps of Adam on the divergence: what copies get, corrections get too.

    The result is float16 in float32 tensors.
    """
    held = {name: (left.clone(), right.clone()) for name, (left, right) in chosen.items()}
    leaves = [Leaf(factor, RATE * float(factor.square().mean().sqrt())) for pair in held.values() for factor in pair]

    def loss(window: int) -> torch.Tensor:
        tokens = windows[window][None]
        with torch.no_grad():
            wanted = teacher.logits(tokens)
        return divergence(student.logits(tokens, weights=corrected(student, held)), wanted)

    plan: Sequence[Sequence[int]] = batches(len(windows), config.steps, BATCH, config.seed)
    descend(leaves, loss, plan, workers)
    return {name: (left.half().float(), right.half().float()) for name, (left, right) in held.items()}
