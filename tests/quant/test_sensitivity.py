"""Sensitivities predict the divergence that small errors of each matrix make, and no thread changes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.family import EMBEDDING
from rondel.converters.huggingface import separate_rows
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.candidates import uses_of
from rondel.quant.rotate import RotateConfig, rotate
from rondel.quant.sensitivity import Sensitivity, measure_sensitivity
from tests.tiny import tiny_model

# Between the divergence that is predicted and the one that is measured, for noise on one matrix: gradients are a sample
# of one label a token, and the terms between rows are left out.
FACTOR = 1.7
ALL_FACTOR = 1.25  # for all matrices together: a tied embedding errs in two places at once, which is left out too
NOISE = 0.01  # of the weights' root mean square: small enough for the second order, large enough for float32
TURNED = 1e-3  # relative: float32 in two bases, where a label that is drawn may tip
CONTEXT = 32


def text(count: int = 32) -> CalibrationText:
    ids = torch.randint(0, 288, (count, CONTEXT), generator=torch.Generator().manual_seed(4))
    return CalibrationText(ids, ("random",))


class Measured:
    """A tiny model, its sensitivities, and the divergence that changed matrices make in transformers."""

    def __init__(self, folder: Path, family: str, **more: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.source: Checkpoint = open_checkpoint(tiny_model(family, folder / "model", **more))
        self.stats = calibrate(self.source, folder / "calib", CalibrateConfig(context=CONTEXT), text())
        self.sensitivity: Sensitivity = measure_sensitivity(self.source, text().windows, folder / "states")
        self.model = AutoModelForCausalLM.from_pretrained(self.source.root, dtype=torch.float32).eval()
        self.base = self.answers()

    def answers(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(text().windows).logits.double().log_softmax(-1)

    def parameter(self, name: str) -> torch.Tensor:
        if name == EMBEDDING:
            return self.model.model.embed_tokens.weight.data
        if name == "output.weight":
            return self.model.lm_head.weight.data
        _, layer, role, _ = name.split(".")
        return self.model.model.layers[int(layer)].get_submodule(self.source.family.linear(role).source).weight.data

    def divergence(self, changes: dict[str, torch.Tensor]) -> float:
        """Mean KL divergence after adding errors, rows in the checkpoint's order, to matrices."""
        kept = {}
        for name, error in changes.items():
            linear = None if not name.startswith("blk.") else self.source.family.linear(name.split(".")[2])
            turned = linear is not None and linear.rope and self.source.family.rope_layout == "interleaved"
            kept[name] = self.parameter(name).clone()
            heads = len(error) // self.source.numbers.head_dim
            self.parameter(name).add_(separate_rows(error, heads) if turned else error)
        new = self.answers()
        for name, weights in kept.items():
            self.parameter(name).copy_(weights)
        return float((self.base.exp() * (self.base - new)).sum(-1).mean())

    def predicted(self, name: str, error: torch.Tensor) -> float:
        total = 0.0
        for use in uses_of(self.source, self.stats, self.sensitivity, name):
            moment = use.moment.double() if use.moment.dim() == 2 else torch.diag(use.moment.double())
            total += 0.5 * float(use.rows @ ((error.double() @ moment) * error.double()).sum(1).numpy())
        return total

    def noise(self, name: str) -> torch.Tensor:
        weights = self.source.read_float(name)
        generator = torch.Generator().manual_seed(len(name))
        return NOISE * weights.square().mean().sqrt() * torch.randn(weights.shape, generator=generator)


CASES: dict[str, Callable[[Path], Measured]] = {
    "llama": lambda folder: Measured(folder, "llama"),  # RoPE rows in another order than transformers'
    "tied": lambda folder: Measured(folder, "qwen3", tied=True),  # the embedding is used in two ways
}


@pytest.fixture(scope="module", params=list(CASES))
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return CASES[request.param](tmp_path_factory.mktemp(request.param))


def test_predicts_the_divergence(measured: Measured) -> None:
    names = [name for name in measured.source.names() if len(measured.source.info(name).shape) == 2]
    noises = {name: measured.noise(name) for name in names}
    expected = {name: measured.predicted(name, noise) for name, noise in noises.items()}
    for name in names:
        found = measured.divergence({name: noises[name]})
        assert found / FACTOR < expected[name] < FACTOR * found, (name, expected[name], found)
    whole = measured.divergence(noises)
    assert whole / ALL_FACTOR < sum(expected.values()) < ALL_FACTOR * whole


def test_knows_which_rows_matter(measured: Measured) -> None:
    """Noise on the half of the rows that are said to matter most does as much more as they say."""
    for name in ("blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.1.ffn_up.weight"):
        rows, noise = measured.sensitivity.rows[name], measured.noise(name)
        upper = torch.from_numpy(rows > np.median(rows))[:, None]
        for part in (noise * upper, noise * ~upper):
            found, expected = measured.divergence({name: part}), measured.predicted(name, part)
            assert found / FACTOR < expected < FACTOR * found, (name, expected, found)


def test_threads_and_files_change_nothing(measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rondel.quant.sensitivity.STATES_IN_MEMORY", 0)
    again = measure_sensitivity(measured.source, text().windows, tmp_path / "states", threads=3)
    assert not (tmp_path / "states").exists()
    first = measured.sensitivity
    assert all(np.array_equal(again.rows[name], rows) for name, rows in first.rows.items())
    assert np.array_equal(again.stream, first.stream)
    assert np.array_equal(again.frequency, first.frequency)
    other = measure_sensitivity(measured.source, text().windows, tmp_path / "states", seed=1)
    assert not np.array_equal(other.stream, first.stream)


def test_turned_ends_change_no_sensitivity_of_the_embedding(tmp_path):
    """A tied head keeps its basis while the stream turns: its two uses are as sensitive as they were."""
    source = open_checkpoint(tiny_model("qwen3", tmp_path / "model", tied=True))
    config = RotateConfig(keep_tied=True, target="rondel")
    rotated = rotate(source, tmp_path / "rotated", config)
    windows = text(4).windows
    plain, turned = (measure_sensitivity(one, windows, tmp_path / "states") for one in (source, rotated))
    np.testing.assert_allclose(turned.stream, plain.stream, rtol=TURNED)
    np.testing.assert_allclose(turned.rows["output.weight"], plain.rows["output.weight"], rtol=TURNED)
