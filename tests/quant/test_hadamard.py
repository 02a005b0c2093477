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
    64: 6, 80: 22, 96: 15, 128: 7, 768: 18, 896: 33, 1024: 10, 1408: 49, 1536: 19, 2048: 11, 2560: 27, 2816: 50,
    3072: 20, 3584: 35, 4096: 12, 4864: 82, 5120: 28, 5632: 51, 6144: 21, 6656: 59, 7168: 36, 8192: 13, 8960: 52,
    9728: 83, 10944: 100, 11008: 178, 12288: 22, 13824: 39, 14336: 37, 16384: 14, 17408: 76, 18432: 31, 18944: 155,
    20480: 30, 25600: 46, 27648: 40, 28672: 38, 29568: 85,
}  # fmt: skip


@pytest.mark.parametrize("order", base_orders())
def test_base_matrices_are_hadamard_in_integers(order):
    matrix = base_matrix(order).to(torch.int64)
    assert set(matrix.unique().tolist()) == {-1, 1}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int64))


def test_base_orders_are_what_the_constructions_give():
    assert {12, 20, 28, 36, 44, 60, 68, 76, 108, 124, 140, 148, 152} <= set(base_orders())
    assert {52, 100, 172, 244} <= set(base_orders())  # GF(25), GF(49), Williamson, GF(121)
    assert not {92, 116, 156, 188, 236} & set(base_orders())


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
    assert hadamard_plan(92) is None
    assert largest_block(92) == 4
    assert largest_block(11776) == 512  # 23 * 2^9
    assert largest_block(352) == 352
    assert largest_block(7) == 1
    assert hadamard_plan(1) == HadamardPlan((), 0)


def column(plan: HadamardPlan, index: int) -> torch.Tensor:
    """One column of the Kronecker product that a plan means, in integers: the product of its factors' columns."""
    factors = [base_matrix(order).to(torch.int64) for order in plan.bases]
    factors += [torch.tensor([[1, 1], [1, -1]])] * plan.log2
    product = torch.ones(1, dtype=torch.int64)
    for factor in reversed(factors):
        index, digit = divmod(index, len(factor))
        product = torch.kron(factor[:, digit], product)
    return product


def dense(size: int, block: int) -> torch.Tensor:
    """The normalized block-diagonal matrix, (size, size) float64."""
    columns = torch.stack([column(hadamard_plan(block), i) for i in range(block)], 1)
    return torch.block_diag(*[columns.double()] * (size // block)) / math.sqrt(block)


@pytest.mark.parametrize(
    ("size", "block"), [(128, 128), (96, 96), (240, 240), (92, 4), (172, 172), (352, 352), (560, 560), (624, 624)]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, FLOAT64_TOLERANCE), (torch.float32, FLOAT32_TOLERANCE)]
)
def test_transform_is_the_dense_kronecker_product(size, block, dtype, tolerance):
    matrix = dense(size, block)
    assert (matrix.T @ matrix - torch.eye(size, dtype=torch.float64)).abs().max() < FLOAT64_TOLERANCE
    x = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = hadamard_transform(x.to(dtype), block)
    assert got.dtype == dtype
    assert (got.double() - x @ matrix.T).abs().max() < tolerance * x.abs().max()


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_transform_of_every_model_size(size):
    generator = torch.Generator().manual_seed(size)
    plan = hadamard_plan(size)
    # A unit vector gives one column of the matrix: exact integers up to the one scale.
    for index in torch.randint(0, size, (3,), generator=generator).tolist():
        unit = torch.zeros(size, dtype=torch.float64)
        unit[index] = 1
        got = hadamard_transform(unit, size) * math.sqrt(size)
        assert (got - column(plan, index)).abs().max() < FLOAT64_TOLERANCE
        assert torch.equal(got.round().to(torch.int64), column(plan, index))
    x = torch.randn(4, size, dtype=torch.float64, generator=generator)
    y = hadamard_transform(x, size)
    assert torch.allclose(y @ y.T, x @ x.T, rtol=0, atol=FLOAT64_TOLERANCE * size)
    assert (hadamard_transform(x.float(), size) - y).abs().max() < FLOAT32_TOLERANCE * y.abs().max()


def test_signs_are_fixed_by_seed_and_site():
    assert random_signs(12, 0, "residual") == random_signs(12, 0, "residual")
    assert random_signs(256, 0, "residual") != random_signs(256, 1, "residual")
    assert random_signs(256, 0, "residual") != random_signs(256, 0, "heads")
    signs = unpack_signs(random_signs(1001, 3, "hidden"), 1001)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.2
    assert unpack_signs("0180", 16).tolist() == [-1.0] + [1.0] * 14 + [-1.0]
