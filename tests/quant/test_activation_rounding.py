"""The activation kinds of a copy: the grid, the dither and the quantizer's own basis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rondel.converters.replication_kinds import ParameterSet
from rondel.quant.activation_rounding import PLACES, dither, hash_words, round_activations, turn

ROUNDING = 1e-12  # relative, float64: a transform and its inverse
STANDARD_ERRORS = 5  # of a mean of uniform numbers


def values(**given: float) -> ParameterSet:
    return {kind: np.array([value], np.float32) for kind, value in given.items()}


def rounded(x: torch.Tensor, **given: float) -> torch.Tensor:
    return round_activations(x, values(**given), 3, 1, np.arange(len(x)))


def inputs(rows: int = 5, channels: int = 24) -> torch.Tensor:
    return torch.randn(rows, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_without_activation_kinds_nothing_happens() -> None:
    x = inputs()
    assert round_activations(x, values(gate_attn=0.5), 0, 0, np.arange(5)) is x


def test_the_grid_of_a_row() -> None:
    x = torch.tensor([[3.0, -1.25, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert rounded(x, act_bits=3).tolist() == [[3.0, -1.0, 0.0, 0.0], [0.0] * 4]  # step 1; ties to even
    assert rounded(x, act_bits=3, act_clip=0.5).tolist()[0] == [1.5, -1.5 + 0.5, 0.5, 0.0]  # -1.25 / 0.5 = -2.5 -> -2
    assert rounded(x, act_bits=2, act_scale=2.0).tolist()[0] == [0.0, 0.0, 0.0, 0.0]  # 3 / 6 ties to 0
    assert torch.equal(rounded(x, act_scale=1.0), rounded(x, act_bits=8))


def test_the_hash_is_the_documented_one() -> None:
    mask = (1 << 64) - 1

    def mix(h: int) -> int:
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & mask
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & mask
        return h ^ (h >> 31)

    h = 0
    for word in (7, 3, 1, 11, 5):
        h = mix(h + word + 0x9E3779B97F4A7C15 & mask)
    assert hash_words(7, 3, 1, 11, 5).tolist() == [h]
    assert dither(7, 3, 1, np.array([11]), 6)[0, 5] == (h >> 40) / 2**24
    assert hash_words(0)[0] == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from the seed 0


def test_stochastic_rounding_has_no_bias_and_depends_on_place_and_position() -> None:
    uniform = dither(1, 0, 0, np.arange(100), 100)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < STANDARD_ERRORS * 12**-0.5 / 100
    x = inputs(200)
    stochastic = rounded(x, act_bits=4, rounding=1)
    step = x.abs().amax(-1, keepdim=True) / 7
    inside = x.abs() < 7 * step  # the largest magnitude cannot be rounded away from zero
    assert ((stochastic - x) / step)[inside].abs().max() < 1
    assert ((stochastic - x) / step)[inside].mean().abs() < STANDARD_ERRORS / inside.sum().sqrt()
    for other in (
        rounded(x, act_bits=4, rounding=2),
        round_activations(x, values(act_bits=4, rounding=1), 2, 1, np.arange(200)),
        round_activations(x, values(act_bits=4, rounding=1), 3, 0, np.arange(200)),
        round_activations(x, values(act_bits=4, rounding=1), 3, 1, np.arange(1, 201)),
    ):
        assert not torch.equal(stochastic, other)
    later = round_activations(x[50:], values(act_bits=4, rounding=1), 3, 1, np.arange(50, 200))
    assert torch.equal(later, stochastic[50:])


@pytest.mark.parametrize("channels", [32, 24, 7])  # one block; blocks of 8; signs alone
def test_a_turn_is_orthogonal_and_comes_back(channels: int) -> None:
    x = inputs(channels=channels)
    turned = turn(x, 9)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(turn(turned, 9, back=True), x, rtol=ROUNDING, atol=ROUNDING)
    assert not torch.equal(turned, turn(x, 10))


def test_a_turn_spreads_an_outlier() -> None:
    x = inputs(channels=32)
    x[:, 3] = 50.0
    plain, turned = rounded(x, act_bits=6), rounded(x, act_bits=6, rotation_seed=4)
    assert (turned - x).norm() < 0.5 * (plain - x).norm()


def test_every_linear_has_a_place() -> None:
    assert sorted(set(PLACES.values())) == [0, 1, 2, 3]
