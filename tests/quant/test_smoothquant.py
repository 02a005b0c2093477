"""SmoothQuant: the formula over all readers of a norm, and what its alpha means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.stats import Stats
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.rotate import RotateConfig, rotate
from rondel.quant.smoothquant import choose, scale_of
from tests.tiny import tiny_model

FLOAT32 = 1e-5  # of a scale


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("llama", tmp_path_factory.mktemp("model") / "hf"))


@pytest.fixture(scope="module")
def stats(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    windows = torch.randint(0, 288, (2, 32), generator=torch.Generator().manual_seed(2))
    config = CalibrateConfig(tokens=64, context=32)
    return calibrate(model, tmp_path_factory.mktemp("stats") / "calib", config, CalibrationText(windows, ("text",)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_follows_the_formula(model: Checkpoint, stats: Stats, alpha: float) -> None:
    found = choose(model, stats, alpha=alpha)
    assert set(found.scales) == {(layer, site) for layer in range(2) for site in ("attn_in", "ffn_in")}
    for (layer, site), scale in found.scales.items():
        roles = ("attn_q", "attn_k", "attn_v") if site == "attn_in" else ("ffn_gate", "ffn_up")
        weights = torch.cat([model.read_float(f"blk.{layer}.{role}.weight") for role in roles]).double()
        expected = stats.absmax(layer, site).double() ** alpha / weights.abs().amax(0) ** (1 - alpha)
        ratio = scale.double() / expected
        assert float(ratio.max() / ratio.min()) - 1 < FLOAT32  # the norm takes up a common factor
        assert float(scale.double().log().mean().abs()) < FLOAT32
    assert found.groups["blk.1.ffn_in"] == {"alpha": alpha}


def test_channels_that_are_never_active_or_never_read_get_finite_scales() -> None:
    inputs, weights = torch.tensor([0.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    scale = scale_of(inputs, weights, 0.5)
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
    assert float(scale[0]) < float(scale[2]) < float(scale[1])
    assert scale_of(torch.zeros(3), weights, 0.5).eq(1).all()


def test_folds_into_the_norms_alone(model: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    made = quantize(model, tmp_path / "out", QuantizeConfig("Q8_0", method="smoothquant+rtn"), stats)
    assert set(made.manifest["quantization"]["rescaling"]) == {
        f"blk.{layer}.{site}" for layer in range(2) for site in ("attn_in", "ffn_in")
    }
    scale = choose(model, stats).scales[1, "attn_in"]
    expected = model.read_float("blk.1.attn_norm.weight") / scale
    assert torch.allclose(made.read("blk.1.attn_norm.weight"), expected)


def test_statistics_behind_a_rotation_hold_no_ranges(model: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    rotated = rotate(model, tmp_path / "rotated", RotateConfig(rotate="always"), stats)
    from rondel.converters.stats import stats_for

    with pytest.raises(RondelError, match=r"largest activations of blk\.0\.attn_in"):
        quantize(rotated, tmp_path / "out", QuantizeConfig("Q8_0", method="smoothquant"), stats_for(rotated, None))
    made = quantize(rotated, tmp_path / "out", QuantizeConfig("Q8_0", method="awq"), stats_for(rotated, None))
    assert not made.read("blk.0.attn_norm.weight").eq(1).all()
