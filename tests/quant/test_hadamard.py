"""Are the Hadamard matrices exact, the plans the cheapest, and the fast transform the dense one?"""

import itertools
import math

import pytest
import torch

from rondel.quant.hadamard import (
    HadamardPlan,
    base_matrix,
    base_orders,
    hadamard_plan,
    hadamard_transform,
    largest_block,
    random_signs,
    unpack_signs,
)

# One rounding an addition, at most log2 + sum of orders of them in sequence: well under these for the sizes here.
FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-5

# Channels of the residual, the heads and the hidden layer of real models, with the additions an element.
MODEL_SIZES = {
    64: 6, 80: 22, 96: 15, 128: 7, 768: 18, 896: 33, 1408: 49, 1536: 19, 2560: 27, 3584: 35, 4864: 82, 5632: 51,
    8960: 52, 9728: 83, 10944: 100, 13824: 39, 14336: 37, 17408: 76, 18432: 31, 18944: 155, 25600: 46, 29568: 85,
}  # fmt: skip


@pytest.mark.parametrize("order", base_orders())
def test_base_matrices_are_hadamard_in_integers(order):
    matrix = base_matrix(order).to(torch.int64)
    assert set(matrix.unique().tolist()) == {-1, 1}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int64))


def test_base_orders_are_what_paley_over_primes_gives():
    assert {12, 20, 28, 36, 44, 60, 68, 76, 108, 124, 140, 148, 152} <= set(base_orders())
    assert not {52, 92, 100, 116, 156, 172, 188, 236} & set(base_orders())


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_plans_of_model_sizes(size):
    plan = hadamard_plan(size)
    assert plan is not None
    assert math.prod(plan.bases) * 2**plan.log2 == size
    assert plan.additions == MODEL_SIZES[size]


def test_plan_is_the_cheapest_of_all():
    for size in range(4, 700, 4):
        candidates = [
            (sum(bases) + int(math.log2(size // math.prod(bases))), len(bases), bases)
            for count in range(3)
            for bases in itertools.combinations_with_replacement(base_orders(), count)
            if size % math.prod(bases) == 0 and math.log2(size // math.prod(bases)).is_integer()
        ]
        expected = min(candidates)[2] if candidates else None
        plan = hadamard_plan(size)
        assert (plan.bases if plan else None) == expected, size


def test_sizes_without_a_plan_fall_back_to_blocks():
    assert hadamard_plan(172) is None
    assert largest_block(172) == 4
    assert largest_block(11008) == 256
    assert largest_block(352) == 352
    assert largest_block(7) == 1
    assert hadamard_plan(1) == HadamardPlan((), 0)


@pytest.mark.parametrize(("size", "block"), [(128, 128), (96, 96), (240, 240), (172, 4), (352, 352), (560, 560)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, FLOAT64_TOLERANCE), (torch.float32, FLOAT32_TOLERANCE)]
)
def test_transform_is_the_dense_kronecker_product(size, block, dtype, tolerance):
    plan = hadamard_plan(block)
    dense = torch.ones(1, 1, dtype=torch.float64)
    for order in plan.bases:
        dense = torch.kron(dense, base_matrix(order).double())
    for _ in range(plan.log2):
        dense = torch.kron(dense, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    dense = torch.block_diag(*[dense] * (size // block)) / math.sqrt(block)
    assert (dense.T @ dense - torch.eye(size, dtype=torch.float64)).abs().max() < FLOAT64_TOLERANCE
    x = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = hadamard_transform(x.to(dtype), block)
    assert got.dtype == dtype
    assert (got.double() - x @ dense.T).abs().max() < tolerance * x.abs().max()


@pytest.mark.parametrize("size", [896, 2560, 4864, 8960, 13824, 14336])
def test_transform_keeps_norms_and_pairs(size):
    x = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = hadamard_transform(x, largest_block(size))
    assert torch.allclose(y @ y.T, x @ x.T, rtol=0, atol=FLOAT64_TOLERANCE * size)


def test_signs_are_fixed_by_seed_and_site():
    assert random_signs(12, 0, "residual") == random_signs(12, 0, "residual")
    assert random_signs(256, 0, "residual") != random_signs(256, 1, "residual")
    assert random_signs(256, 0, "residual") != random_signs(256, 0, "heads")
    signs = unpack_signs(random_signs(1001, 3, "hidden"), 1001)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.2
    assert unpack_signs("0180", 16).tolist() == [-1.0] + [1.0] * 14 + [-1.0]
