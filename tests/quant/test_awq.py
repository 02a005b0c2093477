"""AWQ: the scales follow the formula, the search finds what the written file then has, and nothing gets worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.stats import Stats, site_tensor
from rondel.native.formats import decode
from rondel.quant import rescaling
from rondel.quant.awq import ALPHAS, scale_of
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.importance import Importance, importance_of
from rondel.quant.quantize import QuantizeConfig, plan, quantize
from rondel.quant.reference import reference_logits
from rondel.quant.rescaled_view import RescaledStats, RescaledView, by_query_head
from tests.tiny import tiny_model

SITES = {"attn_in": ("attn_q", "attn_k", "attn_v"), "heads": ("attn_output",), "ffn_in": ("ffn_gate", "ffn_up")}
SITES |= {"hidden": ("ffn_down",)}
# The journal keeps six digits; rows that another place divides are rounded with scales a half is a little off for.
SAME_ERROR = 2e-3
# Of the largest logit, on average: what sixteen-bit weights lose through two layers; a wrong fold loses all of it.
HALVES = 2e-3
OUTLIER = 30.0  # how much larger the gain of some channels is made: what AWQ was invented for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Some channels of every norm stand out, as in language models."""
    folder = tmp_path_factory.mktemp("model")
    made = tiny_model("qwen2", folder / "hf", width=256, hidden=512, heads=4, kv_heads=2, layers=2)
    from safetensors.torch import load_file, save_file

    tensors = load_file(made / "model.safetensors")
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name][[3, 77, 130]] *= OUTLIER
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensors[name][:, [3, 77, 130]] /= OUTLIER
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(made)


@pytest.fixture(scope="module")
def stats(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    windows = torch.randint(0, 288, (8, 64), generator=torch.Generator().manual_seed(2))
    config = CalibrateConfig(tokens=512, context=64)
    return calibrate(model, tmp_path_factory.mktemp("stats") / "calib", config, CalibrationText(windows, ("text",)))


def test_scales_follow_the_formula() -> None:
    means = torch.tensor([4.0, 1.0, 0.25, 16.0])
    got = scale_of(means, 0.5).double()
    expected = means.double() ** 0.25
    assert torch.allclose(got, expected / expected.prod() ** 0.25, rtol=1e-6)  # float32
    assert scale_of(means, 0).eq(1).all()
    assert scale_of(torch.zeros(4), 0.5).eq(1).all()
    dead = scale_of(torch.tensor([0.0, 1.0, 1.0, 1.0]), 1)
    assert bool((torch.isfinite(dead) & (dead > 0)).all())


@pytest.mark.parametrize("type_", ["Q2_K_S", "IQ2_XXS"])
def test_what_the_search_measures_is_what_the_file_has(
    model: Checkpoint, stats: Stats, tmp_path: Path, type_: str
) -> None:
    made = quantize(model, tmp_path / "out", QuantizeConfig(type_, method="awq"), stats)
    groups = made.manifest["quantization"]["rescaling"]
    assert list(groups) == [f"blk.{layer}.{site}" for layer in range(2) for site in SITES]
    means = {site: stats.diagonal(1, site) for site in SITES}
    heads = by_query_head(means["heads"], model.numbers).mean(0).reshape(2, 1, 64)  # 2 of 4 heads share a value head
    means["heads"] = heads.expand(2, 2, 64).flatten()
    scales = {(1, site): scale_of(means[site], groups[f"blk.1.{site}"]["alpha"]) for site in SITES}
    view, moved = RescaledView(model, scales), RescaledStats(stats, scales)
    for site, roles in SITES.items():
        told = groups[f"blk.1.{site}"]
        assert told["alpha"] in ALPHAS
        assert told["error"] <= told["unscaled"]
        errors = []
        for role in roles:
            info = made.info(f"blk.1.{role}.weight")
            weights = view.read(info.name).double()
            lost = torch.from_numpy(decode(info.format, made.packed(info.name).data.numpy(), *info.shape)) - weights
            made_of = {"ffn_up": "hidden", "attn_v": "heads"}.get(role)
            if made_of:  # rows are divided by what the next linear's columns are multiplied by
                rows = scales[1, made_of].double()
                rows = by_query_head(rows, model.numbers)[0] if made_of == "heads" else rows
                weights, lost = weights * rows[:, None], lost * rows[:, None]
            moment = moved.read(site_tensor(1, site, "second_moment")).double()
            errors.append(float(((lost @ moment) * lost).sum() / ((weights @ moment) * weights).sum()))
        assert told["error"] == pytest.approx(np.mean(errors), rel=SAME_ERROR), site
    norm = made.read("blk.1.ffn_norm.weight")
    assert norm.dtype == torch.float32
    assert torch.allclose(norm.double(), model.read_float("blk.1.ffn_norm.weight") / scales[1, "ffn_in"].double())
    gained = [told["error"] < told["unscaled"] for told in groups.values()]
    assert sum(gained) >= len(gained) / 2  # the channels that stand out are worth a scale


@pytest.mark.parametrize("method", ["awq", "smoothquant", "awq+rtn", "awq+gptq"])
def test_the_written_model_computes_the_same_function(
    model: Checkpoint, stats: Stats, tmp_path: Path, method: str
) -> None:
    config = QuantizeConfig("Q8_0", method=method, alpha=0.8, tensors=((".", "F16"),))
    made = quantize(model, tmp_path / "out", config, stats)
    assert not torch.equal(made.read("blk.0.attn_norm.weight"), model.read_float("blk.0.attn_norm.weight"))
    tokens = torch.arange(40)
    expected = reference_logits(model, tokens)
    assert float((reference_logits(made, tokens) - expected).abs().mean() / expected.abs().max()) < HALVES


def test_diagonals_will_do(model: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    matrices = {
        f"blk.{layer}.{role}.weight": stats.diagonal(layer, site).numpy()
        for layer in range(2)
        for site, roles in SITES.items()
        for role in roles
    }
    made = quantize(model, tmp_path / "out", QuantizeConfig("Q2_K", method="awq"), Importance(matrices=matrices))
    groups = made.manifest["quantization"]["rescaling"].values()
    assert all(told["error"] <= told["unscaled"] for told in groups)
    assert any(told["alpha"] > 0 for told in groups)


def test_an_interrupted_run_does_not_search_again_and_threads_change_nothing(
    model: Checkpoint, stats: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig("Q4_K", method="awq+imatrix")
    whole = quantize(model, tmp_path / "whole", config, stats, threads=1)

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("blk.1."):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", config, stats, threads=2, progress=stop)
    monkeypatch.setattr(rescaling, "choose", None)  # a second search would call it
    made = quantize(model, tmp_path / "out", config, stats, threads=2)
    assert made.manifest == whole.manifest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_refusals(model: Checkpoint, stats: Stats) -> None:
    config, seen = QuantizeConfig("Q4_K", method="awq"), importance_of(stats)
    elsewhere = replace(seen, stats=Stats(stats.root, {**stats.manifest, "rotations": [{"site": "hidden"}]}))
    for changes, given, message in [
        ({}, None, "--method awq.imatrix: needs statistics"),
        ({"alpha": 1.5}, stats, "--alpha 1.5: expected a number from 0 to 1"),
        ({"alpha": 0.5, "method": "imatrix"}, stats, "imatrix rescales nothing"),
        ({"method": "smoothquant"}, Importance(matrices={}), "largest activations of blk.0.attn_in"),
        ({"method": "awq+rtn"}, elsewhere, "another basis"),
    ]:
        with pytest.raises(RondelError, match=message):
            plan(model, replace(config, **changes), given)
