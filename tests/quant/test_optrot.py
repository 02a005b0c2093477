"""Does OptRot make the fourth powers of the weights smaller, by a rotation, the same for any number of threads?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.family import EMBEDDING, OUTPUT
from rondel.converters.rotation import HADAMARD, Rotation
from rondel.quant import optrot
from rondel.quant.hadamard import random_signs, rotate_channels, rotate_channels_back
from rondel.quant.optrot import fourth_powers, optimize, weight_rows
from rondel.quant.orthogonal import dense_matrix, orthonormalized, random_orthogonal, with_matrix
from rondel.quant.rotate import RotateConfig
from rondel.quant.rotated_view import RotatedView
from rondel.quant.workers import Workers
from tests.tiny import tiny_model

ORTHOGONAL = 1e-12  # largest entry of R^T R - I: a few hundred float64 roundings
FLOAT32_SUMS = 1e-5  # objectives are sums of float32 products
DIGITS = 6  # central differences of a quartic, in float64, keep half of sixteen digits
LITTLE = 0.9  # what is left of the objective where there is something to gain


def heavy_rows(seed: int = 0) -> torch.Tensor:
    """Rows with heavy tails in a basis that a random rotation hides but for a part."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(600, 24, generator=generator, dtype=torch.float64) ** 3
    return (values @ random_orthogonal(1, 24, seed, "test")[0]).float()


def off(matrix: torch.Tensor) -> float:
    return float((matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=torch.float64)).abs().max())


def test_random_orthogonal_matrices_are_orthogonal_and_their_own():
    made = random_orthogonal(3, 40, 1, "residual")
    assert made.shape == (3, 40, 40)
    assert off(made) < ORTHOGONAL
    assert torch.equal(made, random_orthogonal(3, 40, 1, "residual"))
    others = [random_orthogonal(3, 40, 2, "residual"), random_orthogonal(3, 40, 1, "heads"), made.roll(1, 0)]
    assert not any(torch.allclose(made, other) for other in others)


def test_the_signs_of_qr_do_not_show():
    # LAPACK's Q has a negative first element, always, where R's diagonal is not made positive.
    firsts = torch.stack([random_orthogonal(1, 4, seed, "residual")[0, 0, 0] for seed in range(64)])
    assert 16 < int((firsts > 0).sum()) < 48
    matrix = random_orthogonal(1, 8, 0, "residual")[0]
    assert torch.allclose(orthonormalized(matrix), matrix, rtol=0, atol=ORTHOGONAL)


def test_a_record_multiplies_each_run_of_blocks_by_its_matrix():
    matrices = random_orthogonal(2, 3, 0, "heads")
    hadamard = Rotation("heads", HADAMARD, False, 18, 1, random_signs(18, 0, "heads"))
    rotation = with_matrix(hadamard, matrices)  # six heads of three channels, three to a matrix
    x = torch.randn(5, 2, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([x[..., 3 * i : 3 * i + 3] @ matrices[i // 3] for i in range(6)], -1)
    assert torch.allclose(rotate_channels(x, rotation), expected, rtol=0, atol=ORTHOGONAL)
    assert torch.allclose(x @ dense_matrix(rotation), expected, rtol=0, atol=ORTHOGONAL)
    assert torch.allclose(rotate_channels_back(expected, rotation), x, rtol=0, atol=ORTHOGONAL)


def test_the_gradient_is_that_of_the_objective():
    rows, rotation = heavy_rows().double(), random_orthogonal(1, 24, 3, "start")[0]
    direction = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    step = 1e-4
    ends = [float(((rows @ (rotation + sign * step * direction)) ** 4).sum()) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    with Workers(1) as workers:
        gradient = optrot._gradient(rows.float(), rotation, workers)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=10**-DIGITS)


def test_the_objective_falls_with_every_step():
    rows, start = heavy_rows(), random_orthogonal(1, 24, 1, "start")[0]
    seen: list[int] = []
    with Workers(1) as workers:
        found = optimize(rows, start, workers, lambda done, total, what: seen.append(done))
        again = optimize(rows, found.matrix, workers)
    turned = rows.double() @ found.matrix
    assert off(found.matrix) < ORTHOGONAL
    assert found.before == pytest.approx(fourth_powers(rows.double() @ start), rel=FLOAT32_SUMS)
    assert found.after == pytest.approx(fourth_powers(turned), rel=FLOAT32_SUMS)
    assert found.after < LITTLE * found.before
    assert seen == sorted(seen)
    assert again.before == pytest.approx(found.after, rel=FLOAT32_SUMS)
    assert again.after <= again.before * (1 + FLOAT32_SUMS)


def test_outliers_of_channels_are_spread():
    # One channel holds all the weight. The best is a row of equal magnitudes, as a Hadamard has, and is found from a
    # random start: x^4 over d channels is then d (1/sqrt d)^4 = 1/d of the start's.
    rows = torch.zeros(64, 16)
    rows[:, 5] = torch.randn(64, generator=torch.Generator().manual_seed(0))
    with Workers(1) as workers:
        found = optimize(rows, random_orthogonal(1, 16, 0, "start")[0], workers)
    assert (found.matrix[5].abs() - 16**-0.5).abs().max() < 0.02  # ENOUGH ends the search near the minimum


def test_threads_do_not_change_a_bit():
    rows, start = heavy_rows().repeat(3, 1), random_orthogonal(1, 24, 1, "start")[0]
    results = []
    for threads in (1, 2):
        with Workers(threads) as workers:
            results.append(optimize(rows, start, workers))
    assert torch.equal(results[0].matrix, results[1].matrix)
    assert results[0].after == results[1].after


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_those_that_the_rotation_turns(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The rows in the rotated basis are the rotated model's: their fourth powers are those that rounding will see."""
    source = open_checkpoint(tiny_model("qwen3", tmp_path / "model", tied=tied))
    rotated = RotatedView(source, RotateConfig(hidden="full", target="rondel"))
    residual, *_ = rotations = rotated.rotations
    weights = []
    for name in dict.fromkeys([*source.names(), OUTPUT]):
        linear = source.family.linear_of(name)
        if name in (EMBEDDING, OUTPUT) or linear is not None:
            weight = rotated.read_float(name)
            vectors = weight.T if linear and linear.writes == "residual" else weight
            weights.append(vectors / vectors.square().mean().sqrt())
    with Workers(1) as workers:
        rows = weight_rows(source, rotations, workers)
        # Thinned out, they are every third row, across the matrices.
        monkeypatch.setattr(optrot, "FEWEST_ROWS", len(rows) // 3)
        monkeypatch.setattr(optrot, "ROWS_PER_CHANNEL", 1)
        third = weight_rows(source, rotations, workers)
    assert torch.allclose(rotate_channels(rows, residual), torch.cat(weights), rtol=0, atol=FLOAT32_SUMS)
    assert torch.allclose(normalize(third), normalize(rows[::3]), rtol=0, atol=FLOAT32_SUMS)
