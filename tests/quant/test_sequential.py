"""Does the run behind a rounded prefix see what a whole transformers model with those weights sees, and is it exact?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import block_tensor
from rondel.converters.huggingface import huggingface_rows
from rondel.quant import model_stream
from rondel.quant.sequential import SequentialRun, split_windows
from rondel.quant.workers import Workers
from tests.tiny import tiny_model

FLOAT32_SUMS = 2e-5  # float32 products in another order than the oracle's; of the largest entry
LAYERS, WINDOWS, CONTEXT = 2, 10, 32


@pytest.fixture(params=["llama", "qwen3"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_model(request.param, tmp_path / "model", layers=LAYERS))


def windows() -> torch.Tensor:
    return torch.randint(0, 288, (WINDOWS, CONTEXT), generator=torch.Generator().manual_seed(4))


def changed(source: Checkpoint, name: str) -> torch.Tensor:
    """A matrix as coarse rounding might leave it."""
    weights = source.read_float(name)
    return (weights * 4).round() / 4


def whole_model(source: Checkpoint, rounded: list[str]) -> Any:
    """The whole transformers model with some matrices replaced by `changed`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.float32).eval()
    for layer in range(LAYERS):
        for linear in source.family.linears:
            name = block_tensor(layer, linear.role)
            if name in rounded:
                rows = huggingface_rows(source, linear, changed(source, name))
                model.model.layers[layer].get_submodule(linear.source).weight.data = rows
    return model


def inputs(model: Any, module: str) -> torch.Tensor:
    """What one linear reads of all windows, (windows, context, d) float64."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(windows())
    handle.remove()
    return seen[0].double()


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got.double() - expected).abs().max() < FLOAT32_SUMS * expected.abs().max())


def test_windows_are_split() -> None:
    assert split_windows(2) == ([0], [1])
    assert split_windows(7) == ([0, 1, 2, 3, 4, 5], [6])
    learnt, held_out = split_windows(17)
    assert held_out == [7, 15]
    assert sorted(learnt + held_out) == list(range(17))


@pytest.mark.parametrize("budget", [model_stream.STATES_IN_MEMORY, 0], ids=["memory", "disk"])
def test_moments_are_those_of_whole_models(
    source: Checkpoint, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Site by site: all matrices in front are rounded in one model and float in the other."""
    monkeypatch.setattr(model_stream, "STATES_IN_MEMORY", budget)
    learnt, held_out = split_windows(WINDOWS)
    rounded: list[str] = []
    with Workers(2) as workers:
        run = SequentialRun(source, windows(), tmp_path, workers, asymmetric=True)
        run.begin()
        for layer in range(LAYERS):
            run.enter()
            for site in source.family.sites:
                linear = source.family.readers(site)[0]
                module = f"model.layers.{layer}.{linear.source}"
                x, y = (inputs(whole_model(source, names), module) for names in (rounded, []))
                found = run.moments(site)
                read, wanted = x[learnt].flatten(0, 1), y[learnt].flatten(0, 1)
                assert found.cross is not None
                assert found.second.dtype == found.cross.dtype == torch.float64
                assert torch.equal(found.second, found.second.T)
                assert close(found.second, read.T @ read / len(read)), (layer, site)
                assert close(found.cross, wanted.T @ read / len(read)), (layer, site)
                if layer == 1 and site == "ffn_in":
                    name = block_tensor(layer, linear.role)
                    weights, candidate = source.read_float(name), changed(source, name)
                    judged = run.judge(site, {name: (weights, [candidate, weights])})[name]
                    outputs = y[held_out] @ weights.double().T
                    assert judged.wanted == pytest.approx(float(outputs.square().sum()), rel=FLOAT32_SUMS)
                    for missed, matrix in zip(judged.missed, (candidate, weights), strict=True):
                        expected = float((outputs - x[held_out] @ matrix.double().T).square().sum())
                        assert missed == pytest.approx(expected, rel=FLOAT32_SUMS)
                for reader in source.family.readers(site):
                    name = block_tensor(layer, reader.role)
                    run.replace(reader, changed(source, name))
                    rounded.append(name)
            run.leave()
        run.enter()
        x = inputs(whole_model(source, rounded), "lm_head")[learnt].flatten(0, 1)
        assert close(run.moments("output_in").second, x.T @ x / len(x))
        run.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_sequential_the_float_model_is_seen(source: Checkpoint, tmp_path: Path) -> None:
    found = {}
    with Workers(1) as workers:
        for replaced in (True, False):
            run = SequentialRun(source, windows(), tmp_path, workers, sequential=False)
            run.begin([(slice(0, 288), torch.zeros(288, 64))] if replaced else None)
            run.enter()
            if replaced:
                for linear in source.family.linears:
                    run.replace(linear, changed(source, block_tensor(0, linear.role)))
            run.leave()
            run.enter()
            found[replaced] = run.moments("hidden")
    assert torch.equal(found[True].second, found[False].second)
    assert found[True].cross is None


def test_threads_do_not_change_a_bit(source: Checkpoint, tmp_path: Path) -> None:
    found = []
    for threads in (1, 3):
        with Workers(threads) as workers:
            run = SequentialRun(source, windows(), tmp_path, workers, asymmetric=True)
            run.begin()
            run.enter()
            run.replace(source.family.linear("ffn_up"), changed(source, "blk.0.ffn_up.weight"))
            moments = run.moments("hidden")
            run.leave()
            run.enter()
            found.append([moments.second, moments.cross, run.moments("heads").second])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_model_that_overflows_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    with Workers(1) as workers:
        run = SequentialRun(source, windows(), tmp_path, workers)
        run.begin()
        run.enter()
        run.replace(source.family.linear("ffn_up"), torch.full((96, 64), 3e38))
        with pytest.raises(RondelError, match="activations at hidden of layer 0 are not finite"):
            run.moments("hidden")
