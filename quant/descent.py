"""Owns gradient descent on token windows that gives the same bits for any number of threads.

The loss of each window of a batch is one worker's, and gradients are added up in the windows' order; torch itself works
on one thread meanwhile. On a GPU, torch's own backward sums may differ from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import log_softmax

from rondel.quant.workers import Workers

Loss = Callable[[int], torch.Tensor]  # of one window, by its number: a scalar
After = Callable[[int, float], bool]
Made = Mapping[str, torch.Tensor]
Gradients = tuple[torch.Tensor | None, ...]


class DescentConfig(Protocol):
    """What of a configuration a descent follows."""

    @property
    def steps(self) -> int:
        """How many."""
        ...

    @property
    def seed(self) -> int:
        """Of the order of windows."""
        ...


@dataclass(frozen=True)
class Leaf:
    """One tensor that is fitted, and its learning rate."""

    tensor: torch.Tensor
    rate: float


@contextmanager
def open_workers(workers: Workers | None) -> Iterator[Workers]:
    """The caller's workers, or one of our own."""
    if workers is not None:
        yield workers
        return
    with Workers(1) as own:
        yield own


def batches(count: int, steps: int, batch: int, seed: int) -> list[list[int]]:
    """The windows (of `count`) of each step: all of them in a seeded order, then all in another, and so on."""
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    batch = min(batch, count)
    while len(order) < steps * batch:
        order += torch.randperm(count, generator=generator).tolist()
    return [order[step * batch : (step + 1) * batch] for step in range(steps)]


def descend(
    leaves: Sequence[Leaf],
    loss: Loss,
    plan: Sequence[Sequence[int]],
    workers: Workers,
    after: After = lambda step, mean: True,
) -> None:
    """Adam (Kingma and Ba 2015) on the mean loss of each batch of `plan`; the rates fall along a half cosine.

    `after(step, loss)` is called behind each step; False ends the descent.
    """
    tensors = [leaf.tensor for leaf in leaves]
    _adam(leaves, lambda windows: _mean(loss, tensors, windows, workers), plan, after)


def descend_through(  # noqa: PLR0917 (as descend, and what stands between leaves and loss)
    leaves: Sequence[Leaf],
    made: Callable[[], Made],
    loss: Callable[[int, Made], torch.Tensor],
    plan: Sequence[Sequence[int]],
    workers: Workers,
    after: After = lambda step, mean: True,
) -> None:
    """As `descend`, where the loss of a window depends on the leaves by way of tensors that are made once a step."""

    def gradients(windows: Sequence[int]) -> tuple[float, Gradients]:
        with torch.enable_grad():
            now = {name: tensor for name, tensor in made().items() if tensor.requires_grad}
        shown = {name: tensor.detach().requires_grad_() for name, tensor in now.items()}
        total, found = _mean(lambda window: loss(window, shown), list(shown.values()), windows, workers)
        reached = [
            (tensor, gradient) for tensor, gradient in zip(now.values(), found, strict=True) if gradient is not None
        ]
        outputs, flowing = [tensor for tensor, _ in reached], [gradient for _, gradient in reached]
        return total, torch.autograd.grad(outputs, [leaf.tensor for leaf in leaves], flowing, allow_unused=True)

    _adam(leaves, gradients, plan, after)


def _mean(
    loss: Loss, tensors: Sequence[torch.Tensor], windows: Sequence[int], workers: Workers
) -> tuple[float, Gradients]:
    """The mean loss of the windows, and its gradients, added up in the windows' order."""

    def one(window: int) -> tuple[float, Gradients]:
        with torch.enable_grad():
            value = loss(window)
            return float(value.detach()), torch.autograd.grad(value, tensors, allow_unused=True)

    total, sums = 0.0, list[torch.Tensor | None]([None] * len(tensors))
    for value, found in workers.map(one, windows):
        total += value
        for number, gradient in enumerate(found):
            if gradient is not None:
                share, known = gradient / len(windows), sums[number]
                sums[number] = share if known is None else known.add_(share)
    return total / len(windows), tuple(sums)


def _adam(
    leaves: Sequence[Leaf],
    gradients: Callable[[Sequence[int]], tuple[float, Gradients]],
    plan: Sequence[Sequence[int]],
    after: After,
) -> None:
    if not plan or not leaves:
        return
    tensors = [leaf.tensor.requires_grad_() for leaf in leaves]
    optimizer = torch.optim.Adam([{"params": [leaf.tensor], "lr": leaf.rate} for leaf in leaves], betas=(0.9, 0.99))
    for step, windows in enumerate(plan):
        loss, found = gradients(windows)
        for tensor, gradient in zip(tensors, found, strict=True):
            tensor.grad = gradient
        for group, leaf in zip(optimizer.param_groups, leaves, strict=True):
            group["lr"] = leaf.rate * 0.5 * (1 + math.cos(math.pi * step / len(plan)))
        optimizer.step()
        if not after(step, loss):
            break
    for tensor in tensors:
        tensor.requires_grad_(False)
        tensor.grad = None


def divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || logits) of positions in nats, both (..., vocabulary)."""
    log_teacher = log_softmax(teacher, -1)
    terms = log_teacher.exp() * (log_teacher - log_softmax(logits, -1))
    return terms.sum(-1).mean()
