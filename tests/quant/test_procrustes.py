"""Does DFRot's alternation never lose, and does it see the tokens that the model makes?"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.family import block_tensor
from rondel.quant import procrustes
from rondel.quant.orthogonal import random_orthogonal
from rondel.quant.procrustes import LEVELS, Alternation, NormedTokens, massive_rows, normed_tokens, optimize, rounded
from rondel.quant.reference import ReferenceModel
from rondel.quant.workers import Workers
from tests.tiny import tiny_model

ORTHOGONAL = 1e-12  # largest entry of R^T R - I: a few hundred float64 roundings
ROUNDING = 1e-12  # of a loss summed in float64, relative
FLOAT32 = 1e-5  # activations of transformers' float32 model
WIDTH = 32


def tokens(massive: int = 0, rows: int = 700) -> NormedTokens:
    """Tokens whose channels differ, some of them all but one-hot."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, WIDTH, generator=generator) * torch.logspace(-1, 1, WIDTH)
    x[:massive] = 0.01 * torch.randn(massive, WIDTH, generator=generator)
    x[:massive, 3] = WIDTH
    return NormedTokens(x, torch.arange(rows) < massive)


def start() -> torch.Tensor:
    return random_orthogonal(1, WIDTH, 1, "start")[0]


def test_rounding_is_to_the_nearest_of_fifteen_levels():
    x = torch.randn(50, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels, scales = rounded(x, torch.zeros(50, 1, dtype=torch.float64))
    codes = levels / scales
    assert (codes - codes.round()).abs().max() < ROUNDING * LEVELS
    assert codes.abs().max() <= LEVELS + ROUNDING
    nearest = (x / scales).round().clamp(-LEVELS, LEVELS) * scales
    assert torch.equal(levels, nearest)
    largest = x.abs().amax(1, keepdim=True) / LEVELS
    plain = (x / largest).round() * largest
    assert (levels - x).square().sum() < (plain - x).square().sum()
    zeros, _ = rounded(torch.zeros(1, WIDTH, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    assert zeros.eq(0).all()


@pytest.mark.parametrize("weight", [1.0, 100.0])
def test_no_turn_is_worse_than_the_one_before(weight: float):
    seen = tokens(massive=8)
    weights = torch.where(seen.massive, weight, 1.0)
    with Workers(1) as workers:
        run = Alternation(seen.rows, weights, start(), workers)
        losses = [run.loss]
        for _ in range(30):
            run.turn()
            losses.append(run.loss)
    assert all(after <= before * (1 + ROUNDING) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]
    turned = seen.rows.double() @ run.rotation
    levels, _ = rounded(turned, run._scales)
    assert losses[-1] == pytest.approx(float(((levels - turned).square() * weights[:, None] ** 2).sum()))


def test_a_procrustes_step_is_the_best_rotation_for_its_levels():
    seen = tokens()
    with Workers(1) as workers:
        run = Alternation(seen.rows, torch.ones(len(seen.rows)), start(), workers)
        turned = seen.rows.double() @ run.rotation
        levels, _ = rounded(turned, run._scales)
        before = run.rotation
        run.turn()
    found = before.T @ run.rotation
    least = (turned @ found - levels).square().sum()
    for seed in range(8):
        noise = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        other = found @ torch.linalg.matrix_exp(0.01 * (noise - noise.T))
        assert least < (turned @ other - levels).square().sum()


def test_the_optimum_is_a_rotation_and_the_same_for_any_number_of_threads():
    seen, results = tokens(massive=8), []
    for threads in (1, 2):
        with Workers(threads) as workers:
            results.append(optimize(seen, start(), "weight", workers))
    one, two = results
    assert torch.equal(one.matrix, two.matrix)
    assert one.after < one.before
    assert (one.matrix.T @ one.matrix - torch.eye(WIDTH, dtype=torch.float64)).abs().max() < ORTHOGONAL


def test_massive_tokens_count_as_they_are_told_to():
    seen = tokens(massive=8)
    with Workers(1) as workers:
        kept, weighted, ignored = (
            optimize(seen, start(), massive, workers).matrix for massive in ("keep", "weight", "ignore")
        )
        without = optimize(NormedTokens(seen.rows[8:], seen.massive[8:]), start(), "keep", workers).matrix

    def loss(rotation: torch.Tensor) -> float:
        turned = seen.rows[:8].double() @ rotation
        return float((rounded(turned, torch.zeros(8, 1, dtype=torch.float64))[0] - turned).square().sum())

    assert torch.equal(ignored, without)
    assert loss(weighted) < loss(kept)


def test_a_token_is_massive_by_one_channel():
    rows = torch.full((3, 400), 0.1)
    rows[1, 7], rows[2] = 50.0, 5.0
    assert massive_rows(rows).tolist() == [False, True, False]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_are_those_behind_the_norms(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = open_checkpoint(tiny_model(family, tmp_path / "model"))
    windows = torch.randint(0, 288, (3, 16), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(procrustes, "TOKENS", 32)  # two of the windows
    with Workers(1) as workers:
        seen = normed_tokens(source, windows, workers, "cpu")
    # Before every norm the stream, brought to a mean square of one, in the order of norms and windows.
    streams: list[torch.Tensor] = []
    model = ReferenceModel(source)
    states = [model.embed(window) for window in windows[:2]]
    for layer in range(2):
        gains = [source.read_float(block_tensor(layer, role)) for role in ("attn_norm", "ffn_norm")]
        found = []
        for state in states:
            inside: list[torch.Tensor] = []
            monkeypatch.setattr(model, "_norm", _recording(model, inside))
            model.block(layer, state)
            monkeypatch.undo()
            found.append([inside[0] / gains[0], inside[-1] / gains[1]])
        streams += [torch.cat([one[norm] for one in found]) for norm in range(2)]
        states = [model.block(layer, state) for state in states]
    last = torch.cat(states)
    streams.append(last * torch.rsqrt(last.square().mean(1, keepdim=True) + source.numbers.norm_epsilon))
    assert torch.allclose(seen.rows.double(), torch.cat(streams), rtol=0, atol=FLOAT32 * 8)  # sqrt(d) at most
    assert not seen.massive.any()


def _recording(model: ReferenceModel, into: list[torch.Tensor]):
    plain = type(model)._norm

    def norm(layer: int, role: str, x: torch.Tensor) -> torch.Tensor:
        made = plain(model, layer, role, x)
        if made.dim() == 2:
            into.append(made)
        return made

    return norm
