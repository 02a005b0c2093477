"""Allocation: one format for every tensor, so that the sum of their costs is smallest within a number of bytes.

This is the multiple-choice knapsack problem. Its Lagrangian, the sum of the smallest cost + price * bytes of every
tensor, bounds the answer from below and, rounded, from above; formats that no answer between the two bounds can use are
dropped (Sinha and Zoltners, Operations Research 27, 1979), and what is left is solved exactly by dynamic programming
over bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Sums of bytes that the dynamic program tells apart. Models of 8B parameters need about 1.4e5 to be solved exactly;
# above this limit bytes are rounded up to a coarser unit, and what that leaves over is spent on single tensors.
STATES = 1 << 18


@dataclass(frozen=True)
class Option:
    """One format that a tensor may get."""

    format: str
    bytes: int
    cost: float


def allocate(options: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """One option of each tensor: the smallest sum of costs that takes at most `budget` bytes.

    Of options that cost the same the smallest is taken. `budget` must reach for the smallest option of every tensor.
    """
    useful = [_useful(tensor) for tensor in options]
    assert sum(tensor[0].bytes for tensor in useful) <= budget, "the budget is too small for any choice"
    price, rounded = _relaxed(useful, budget)
    kept = _possible(useful, budget, price, sum(option.cost for option in rounded))
    solved = _filled(useful, _solve(kept, budget), budget)
    return min(solved, _filled(useful, rounded, budget), key=lambda chosen: sum(option.cost for option in chosen))


def _useful(tensor: Sequence[Option]) -> list[Option]:
    """The options by size, each cheaper in cost than all smaller ones."""
    kept: list[Option] = []
    for option in sorted(tensor, key=lambda option: (option.bytes, option.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _hull(tensor: Sequence[Option]) -> list[Option]:
    """The lower convex hull of cost over bytes."""
    hull: list[Option] = []
    for option in tensor:
        while len(hull) > 1 and _gain(hull[-2], option) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _gain(small: Option, large: Option) -> float:
    """What one byte more saves between two options."""
    return (small.cost - large.cost) / (large.bytes - small.bytes)


def _relaxed(useful: Sequence[Sequence[Option]], budget: int) -> tuple[float, list[Option]]:
    """The price of a byte at which the Lagrangian is highest, and the steps along the hulls that pay it and fit."""
    hulls = [_hull(tensor) for tensor in useful]
    steps = [(-_gain(*hull[i : i + 2]), index, i + 1) for index, hull in enumerate(hulls) for i in range(len(hull) - 1)]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(option.bytes for option in chosen)
    for gain, index, place in sorted(steps):
        left -= hulls[index][place].bytes - chosen[index].bytes
        if left < 0:
            return -gain, chosen
        chosen[index] = hulls[index][place]
    return 0.0, chosen


def _possible(useful: Sequence[Sequence[Option]], budget: int, price: float, best: float) -> list[list[Option]]:
    """The options that an answer as good as `best` may hold: the others raise the Lagrangian's bound above it."""
    least = [min(option.cost + price * option.bytes for option in tensor) for tensor in useful]
    gap = best - (math.fsum(least) - price * budget)
    slack = 1e-9 * (best + price * budget)  # of rounding in these sums
    return [
        [option for option in tensor if option.cost + price * option.bytes - bound <= gap + slack]
        for tensor, bound in zip(useful, least, strict=True)
    ]


def _solve(kept: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """Dynamic programming: for every number of units spent, the smallest cost of the tensors so far."""
    room = budget - sum(tensor[0].bytes for tensor in kept)
    unit = math.gcd(*(option.bytes - tensor[0].bytes for tensor in kept for option in tensor)) or 1
    unit *= -(-(room // unit + 1) // STATES)
    units = room // unit
    best = np.zeros(units + 1)
    places = []
    for tensor in kept:
        costs, place = np.full(units + 1, np.inf), np.zeros(units + 1, np.int8)
        for i, option in enumerate(tensor):
            step = -(-(option.bytes - tensor[0].bytes) // unit)
            if step > units:
                break
            reached = best[: units + 1 - step] + option.cost
            better = reached < costs[step:]
            costs[step:][better] = reached[better]
            place[step:][better] = i
        best = costs
        places.append(place)
    spent = int(best.argmin())
    chosen = []
    for tensor, place in zip(reversed(kept), reversed(places), strict=True):
        option = tensor[place[spent]]
        spent -= -(-(option.bytes - tensor[0].bytes) // unit)
        chosen.append(option)
    return chosen[::-1]


def _filled(useful: Sequence[Sequence[Option]], chosen: list[Option], budget: int) -> list[Option]:
    """Spend what is left on single tensors, the largest saving first."""
    chosen = list(chosen)
    while True:
        left = budget - sum(option.bytes for option in chosen)
        saved, index, better = 0.0, -1, chosen[0]
        for i, (tensor, now) in enumerate(zip(useful, chosen, strict=True)):
            for option in tensor:
                if option.bytes - now.bytes <= left and now.cost - option.cost > saved:
                    saved, index, better = now.cost - option.cost, i, option
        if index < 0:
            return chosen
        chosen[index] = better
