"""Does a rescaled model compute the same function, do its statistics follow, and is what cannot follow refused?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.stats import site_tensor
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.importance import Importance
from rondel.quant.reference import reference_logits
from rondel.quant.rescaled_view import (
    RescaledStats,
    RescaledView,
    Scales,
    over_query_heads,
    rescalable,
    rescaled_importance,
)
from rondel.quant.rotate import RotateConfig
from rondel.quant.rotated_view import RotatedView
from tests.tiny import tiny_model

EXACT = 1e-10  # of the largest logit: the arithmetic's own error in float64
BROKEN = 0.05  # what a wrong scale must at least change
SPREAD = 0.7  # standard deviation of the logarithm of the scales
# Of the largest value: the calibrated statistics are float32 and so is the model that made them.
STATISTIC = 1e-4

MODELS = {
    "llama": {"family": "llama", "attention_bias": True, "heads": 6, "kv_heads": 2, "head_dim": 16, "width": 48},
    "llama-tied": {"family": "llama", "tied": True},
    "qwen2": {"family": "qwen2", "tied": True, "heads": 6, "kv_heads": 2, "width": 96},
    "qwen3": {"family": "qwen3", "heads": 6, "kv_heads": 2, "head_dim": 24, "width": 40, "hidden": 172},
}
TOKENS = torch.randint(0, 288, (24,), generator=torch.Generator().manual_seed(5))


def model(name: str, folder: Path) -> Checkpoint:
    settings = dict(MODELS[name])
    return open_checkpoint(tiny_model(str(settings.pop("family")), folder / name, **settings))


def random_scales(source: Checkpoint) -> dict[tuple[int | None, str], torch.Tensor]:
    """Lognormal scales at every place that can have some, the head's input included."""
    generator = torch.Generator().manual_seed(1)

    def draw(size: int) -> torch.Tensor:
        return torch.exp(SPREAD * torch.randn(size, generator=generator, dtype=torch.float64))

    numbers, scales = source.numbers, {}
    for layer in range(numbers.layers):
        for place in rescalable(source, layer):
            cols = source.family.readers(place[1])[0].cols
            heads = place[1] == "heads"
            scales[place] = (
                over_query_heads(draw(numbers.size("values")), numbers) if heads else draw(numbers.size(cols))
            )
    if "output.weight" in source:
        scales[None, "output_in"] = draw(numbers.width)
    return scales


def difference(got: Checkpoint, expected: Checkpoint) -> float:
    logits = reference_logits(expected, TOKENS)
    return float((reference_logits(got, TOKENS) - logits).abs().max() / logits.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_computes_the_same_function(name: str, tmp_path: Path) -> None:
    source = model(name, tmp_path)
    scales = random_scales(source)
    assert {site for layer, site in scales if layer is not None} == {"attn_in", "heads", "ffn_in", "hidden"}
    view = RescaledView(source, scales)
    assert difference(view, source) < EXACT
    for role in ("attn_q", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"):
        assert not torch.equal(view.read(f"blk.1.{role}.weight"), source.read_float(f"blk.1.{role}.weight").double())


@pytest.mark.parametrize("site", ["attn_in", "heads", "ffn_in", "hidden"])
def test_each_place_alone_and_half_of_it_breaks_the_model(site: str, tmp_path: Path) -> None:
    source = model("llama", tmp_path)
    scales = {place: scale for place, scale in random_scales(source).items() if place == (1, site)}
    assert difference(RescaledView(source, scales), source) < EXACT
    broken = RescaledView(source, scales)
    broken._rows = {}
    assert difference(broken, source) > BROKEN


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (RotateConfig(), {"attn_in", "heads", "ffn_in", "hidden"}),
        (RotateConfig(hidden=4, target="rondel"), {"attn_in", "heads", "ffn_in"}),
    ],
)
def test_a_rotated_model_is_rescaled_in_its_own_basis(config: RotateConfig, kept: set[str], tmp_path: Path) -> None:
    source = RotatedView(model("llama", tmp_path), config)
    scales = random_scales(source)
    assert {site for layer, site in scales if layer is not None} == kept
    assert difference(RescaledView(source, scales), source) < EXACT


def test_refuses_what_would_change_the_model(tmp_path: Path) -> None:
    source = model("qwen2", tmp_path)
    ones = torch.ones(96, dtype=torch.float64)
    uneven = ones.clone()
    uneven[0] = 2  # the first query head reads a value channel that two others read as well
    rotated = RotatedView(source, RotateConfig(residual=False, heads=False, hidden="full", target="rondel"))
    for of, place, scale, message in [
        (source, (0, "heads"), uneven, "share its values"),
        (source, (0, "ffn_in"), ones[:5], r"\[5\], expected \[96\]"),
        (source, (0, "ffn_in"), ones * 0, "not a positive number"),
        (source, (0, "attn_in"), ones * float("nan"), "not a positive number"),
        (source, (None, "output_in"), ones, "head is the embedding"),
        (source, (0, "queries"), ones, "neither a norm nor a linear"),
        (rotated, (0, "hidden"), ones, "online rotation"),
    ]:
        with pytest.raises(RondelError, match=message):
            RescaledView(of, {place: scale})


def test_statistics_follow(tmp_path: Path) -> None:
    source = model("qwen3", tmp_path)
    scales: Scales = random_scales(source)
    windows = TOKENS.reshape(1, -1)
    text = CalibrationText(windows, ("text",))
    config = CalibrateConfig(tokens=24, context=24)
    moved = RescaledStats(calibrate(source, tmp_path / "calib", config, text), scales)
    fresh = calibrate(RescaledView(source, scales), tmp_path / "fresh", config, text)
    for layer, site in scales:
        for what in ("second_moment", "diagonal", "absmax"):
            name = site_tensor(layer, site, what)
            got, expected = moved.read(name), fresh.read(name)
            assert float((got - expected).abs().max()) < STATISTIC * float(expected.abs().max()), name
    assert moved.count(0, "ffn_in") == 24


def test_importance_of_an_imatrix_file_follows_as_the_statistics_do(tmp_path: Path) -> None:
    source = model("llama", tmp_path)
    scales = random_scales(source)
    means = np.arange(1, 49, dtype=np.float32)
    named = {"blk.0.attn_q.weight": means, "blk.7.other.weight": means}
    moved = rescaled_importance(Importance(matrices=named), source, scales)
    expected = means / scales[0, "attn_in"].square().numpy()
    assert moved.matrices["blk.0.attn_q.weight"] == pytest.approx(expected, rel=1e-6)  # float32
    assert moved.matrices["blk.7.other.weight"] is means
