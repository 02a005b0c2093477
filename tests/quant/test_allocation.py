"""The solver of the allocation: as good as trying everything, and within the budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rondel.quant import allocation
from rondel.quant.allocation import Option, allocate

SUMS = 1e-12  # relative: the same costs, added in another order
COARSE = 0.02  # relative: what a unit of one hundredth of the budget may cost in the instance below


def spent(chosen: list[Option]) -> int:
    return sum(option.bytes for option in chosen)


def lost(chosen: list[Option]) -> float:
    return sum(option.cost for option in chosen)


def tried(options: list[list[Option]], budget: int) -> float:
    """The smallest cost of all choices that fit."""
    return min(lost(list(chosen)) for chosen in itertools.product(*options) if spent(list(chosen)) <= budget)


option = st.builds(Option, st.just("X"), st.integers(1, 40).map(lambda n: 32 * n), st.floats(0, 1, width=32))
instance = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=300)
@given(instance, st.floats(0, 1))
def test_as_good_as_trying_everything(options: list[list[Option]], share: float) -> None:
    least = sum(min(o.bytes for o in tensor) for tensor in options)
    most = sum(max(o.bytes for o in tensor) for tensor in options)
    budget = least + int(share * (most - least))
    chosen = allocate(options, budget)
    assert spent(chosen) <= budget
    assert all(choice in tensor for choice, tensor in zip(chosen, options, strict=True))
    assert lost(chosen) == pytest.approx(tried(options, budget), rel=SUMS, abs=SUMS)


def model(layers: int) -> list[list[Option]]:
    """Tensors of a transformer: errors fall by four a bit, sensitivities are spread over two orders of magnitude."""
    generator = np.random.default_rng(1)
    sizes = [1 << 12] * 4 + [3 << 12] * 3
    bits = (1.5625, 2.0625, 2.3125, 2.5625, 2.625, 3.0625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5, 16)
    return [
        [
            Option(str(b), int(b * size // 8), float(np.exp(w) * 4.0**-b * size * generator.uniform(0.9, 1.1)))
            for b in bits
        ]
        for size in sizes * layers
        for w in [generator.normal() * 2]
    ]


def test_budgets_are_filled_and_more_bytes_never_cost_more() -> None:
    options = model(layers=12)
    least = sum(min(o.bytes for o in tensor) for tensor in options)
    most = sum(max(o.bytes for o in tensor) for tensor in options)
    costs = []
    for budget in np.linspace(least, most, 12).astype(int).tolist():
        chosen = allocate(options, budget)
        left = budget - spent(chosen)
        assert left >= 0
        better = [o for tensor, now in zip(options, chosen, strict=True) for o in tensor if o.cost < now.cost
                  and o.bytes - now.bytes <= left]  # fmt: skip
        assert not better, "bytes are left that would make a tensor better"
        costs.append(lost(chosen))
    assert costs == sorted(costs, reverse=True)
    assert [o.bytes for o in allocate(options, most + 1)] == [max(o.bytes for o in tensor) for tensor in options]


def test_coarse_units_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    options = model(layers=4)
    budget = sum(tensor[6].bytes for tensor in options) + 17
    exact = allocate(options, budget)
    monkeypatch.setattr(allocation, "STATES", 100)
    coarse = allocate(options, budget)
    assert spent(coarse) <= budget
    assert lost(exact) <= lost(coarse) <= (1 + COARSE) * lost(exact)
