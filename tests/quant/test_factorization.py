"""The factor of a second moment: that of the damped inverse, damped more where it must be, and what memory it takes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from rondel.quant import factorization
from rondel.quant.factorization import DAMPING, DAMPING_STEP, factorize

COLS = 96
ROUNDED = 1e-4  # of a product with the inverse: both are handed on in float32, and the condition is about 100


def some_moments() -> torch.Tensor:
    random = np.random.default_rng(1)
    basis = np.linalg.qr(random.standard_normal((COLS, COLS)))[0]
    inputs = (random.standard_normal((4 * COLS, COLS)) * np.arange(1, COLS + 1) ** -0.5) @ basis
    return torch.from_numpy(inputs.T @ inputs / len(inputs))


@pytest.fixture(params=[512, 40])
def panel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One panel alone, and several with a rest."""
    monkeypatch.setattr(factorization, "PANEL", request.param)
    monkeypatch.setattr(factorization, "SWAPPED", 1000)


@pytest.mark.usefixtures("panel")
def test_the_factor_is_that_of_the_damped_inverse() -> None:
    moments = some_moments()
    factor = factorize(moments.clone())
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(COLS)
    assert torch.equal(factor.moments, damped.float())
    assert torch.equal(factor.upper, factor.upper.triu())
    product = damped @ factor.upper.double().T @ factor.upper.double()
    assert (product - torch.eye(COLS)).abs().max() < ROUNDED


@pytest.mark.usefixtures("panel")
def test_moments_that_are_not_definite_are_damped_more() -> None:
    """What is left of the try that failed must not be in the factor."""
    moments = some_moments()
    mean = moments.diagonal().mean()
    moments -= 5 * DAMPING * mean * torch.outer(torch.ones(COLS), torch.ones(COLS)).double()
    mean = moments.diagonal().mean()
    least = torch.linalg.eigvalsh(moments)[0]
    tries = [DAMPING * DAMPING_STEP**step for step in range(6)]
    damping = next(share for share in tries if share * mean > -least)
    assert damping > DAMPING
    factor = factorize(moments.clone())
    damped = moments + damping * mean * torch.eye(COLS)
    torch.testing.assert_close(factor.moments, damped.float())
    product = damped @ factor.upper.double().T @ factor.upper.double()
    assert (product - torch.eye(COLS)).abs().max() < ROUNDED


def test_nothing_seen_leaves_a_factor() -> None:
    factor = factorize(torch.zeros(8, 8, dtype=torch.float64))
    assert torch.equal(factor.upper, torch.eye(8))
    assert torch.equal(factor.moments, torch.eye(8))


def test_what_has_no_factor_is_refused() -> None:
    with pytest.raises(ArithmeticError, match="no factor at any damping"):
        factorize(torch.full((4, 4), torch.nan, dtype=torch.float64))


PEAK = """
import resource, torch
from rondel.quant.factorization import factorize

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
factorize(2 * torch.eye(600, dtype=torch.float64))
before, columns = peak(), 3072
factorize(2 * torch.eye(columns, dtype=torch.float64))
print((peak() - before) / (8 * columns**2))
"""
# The moment, with its factor in the other half, and both results in float32 make 2; the rest are panels.
MATRICES = 2.8


def test_a_large_moment_is_factored_in_place() -> None:
    """What decides the memory of the whole stage: each copy of the largest second moment outweighs a block."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < MATRICES
