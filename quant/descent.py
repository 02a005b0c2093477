"""Owns gradient descent on token windows that gives the same bits for any number of threads.

The loss of each window of a batch is one worker's, and gradients are added up in the windows' order; torch itself works
on one thread meanwhile. On a GPU, torch's own backward sums may differ from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax

from rondel.quant.workers import Workers

Loss = Callable[[int], torch.Tensor]  # of one window, by its number: a scalar


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
    after: Callable[[int, float], bool] = lambda step, mean: True,
) -> None:
    """Adam (Kingma and Ba 2015) on the mean loss of each batch of `plan`; the rates fall along a half cosine.

    `after(step, loss)` is called behind each step; False ends the descent.
    """
    if not plan or not leaves:
        return
    tensors = [leaf.tensor.requires_grad_() for leaf in leaves]
    optimizer = torch.optim.Adam([{"params": [leaf.tensor], "lr": leaf.rate} for leaf in leaves], betas=(0.9, 0.99))

    def gradients(window: int) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        with torch.enable_grad():
            value = loss(window)
            return float(value.detach()), torch.autograd.grad(value, tensors, allow_unused=True)

    for step, windows in enumerate(plan):
        total = 0.0
        optimizer.zero_grad(set_to_none=True)
        for value, found in workers.map(gradients, windows):
            total += value
            for tensor, gradient in zip(tensors, found, strict=True):
                if gradient is not None:
                    share = gradient / len(windows)
                    tensor.grad = share if tensor.grad is None else tensor.grad.add_(share)
        for group, leaf in zip(optimizer.param_groups, leaves, strict=True):
            group["lr"] = leaf.rate * 0.5 * (1 + math.cos(math.pi * step / len(plan)))
        optimizer.step()
        if not after(step, total / len(windows)):
            break
    for tensor in tensors:
        tensor.requires_grad_(False)


def divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || logits) of positions in nats, both (..., vocabulary)."""
    log_teacher = log_softmax(teacher, -1)
    terms = log_teacher.exp() * (log_teacher - log_softmax(logits, -1))
    return terms.sum(-1).mean()
