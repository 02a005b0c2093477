"""The comparison of methods: what the table says is what the written models have, judged on text held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.stats import Stats
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.compare import compare, held_out
from rondel.quant.decoded_view import DecodedView
from rondel.quant.divergence import Judge
from rondel.quant.importance import Importance
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.reference import reference_logits
from rondel.quant.rotate import RotateConfig
from rondel.quant.rotated_view import RotatedView
from rondel.quant.workers import Workers
from tests.tiny import tiny_model

WINDOWS, CONTEXT = 16, 32
# Relative: six digits, float32 sums, and rows that awq divides, whose scales a half is a little off for.
SAME_ERROR = 2e-3
SAME_KL = 1e-3  # relative: logits in float32 against float64
NO_KL = 1e-8  # nats: a model against itself, its logits stored as float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model") / "hf"
    return open_checkpoint(
        tiny_model("qwen2", folder, width=256, hidden=256, heads=4, kv_heads=2, layers=1, context=64)
    )


@pytest.fixture(scope="module")
def stats(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    windows = torch.randint(0, 288, (WINDOWS, CONTEXT), generator=torch.Generator().manual_seed(2))
    config = CalibrateConfig(tokens=WINDOWS * CONTEXT, context=CONTEXT)
    return calibrate(model, tmp_path_factory.mktemp("stats") / "calib", config, CalibrationText(windows, ("text",)))


def test_the_table_tells_of_what_each_method_writes(model: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    config, methods = QuantizeConfig("Q2_K"), ["rtn", "awq", "smoothquant"]
    told = compare(model, config, stats, methods=methods, out=tmp_path / "kept", threads=1)
    assert [row["method"] for row in told["methods"]] == ["rtn", "awq+imatrix", "smoothquant+imatrix"]
    assert (told["windows"], told["context"]) == (2, CONTEXT)
    assert len({row["bytes"] for row in told["methods"]}) == 1
    rtn, awq, _ = told["methods"]
    alone = quantize(model, tmp_path / "rtn", QuantizeConfig("Q2_K", method="rtn"), stats)
    for file in alone.root.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "kept" / "rtn" / file.name).read_bytes()
    moment = stats.second_moment(0, "hidden")
    assert moment is not None
    weights = model.read_float("blk.0.ffn_down.weight").double()
    lost = DecodedView(alone).read_float("blk.0.ffn_down.weight") - weights
    expected = ((lost @ moment.double()) * lost).sum() / ((weights @ moment.double()) * weights).sum()
    assert rtn["roles"]["ffn_down"] == pytest.approx(float(expected), rel=SAME_ERROR)
    assert rtn["error"] == pytest.approx(np.mean(list(rtn["roles"].values())), rel=SAME_ERROR)
    groups = open_checkpoint(tmp_path / "kept" / "awq+imatrix").manifest["quantization"]["rescaling"]
    for place, roles in {"attn_in": ("attn_q", "attn_k", "attn_v"), "hidden": ("ffn_down",)}.items():
        got = np.mean([awq["roles"][role] for role in roles])
        assert got == pytest.approx(groups[f"blk.0.{place}"]["error"], rel=SAME_ERROR)
    again = compare(model, config, stats, methods=methods, out=tmp_path / "kept", threads=2)
    assert all(row["seconds"] is None for row in again["methods"])  # nothing was quantized, so nothing was timed
    assert [row | {"seconds": 0} for row in again["methods"]] == [row | {"seconds": 0} for row in told["methods"]]


def test_predictions_are_judged_as_the_reference_would(model: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    made = DecodedView(quantize(model, tmp_path / "out", QuantizeConfig("Q2_K"), stats))
    windows = held_out(stats)
    whole = stats.windows()
    assert whole is not None
    assert torch.equal(windows, whole[7::8])
    with Workers(1) as workers:
        judge = Judge(model, windows, workers)
        told, same = judge.measure(made), judge.measure(model)
    kl, nll = [], []
    for window in windows:
        rows = slice(CONTEXT // 2, CONTEXT - 1)
        base, other = (reference_logits(of, window)[rows].log_softmax(-1) for of in (model, made))
        kl.append((base.exp() * (base - other)).sum(-1))
        nll.append(-other[torch.arange(len(other)), window[CONTEXT // 2 + 1 :]])
    assert told["mean_kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=SAME_KL)
    assert told["nll"] == pytest.approx(float(torch.cat(nll).mean()), rel=SAME_KL)
    assert told["base_perplexity"] == pytest.approx(same["perplexity"])
    assert abs(same["mean_kl"]) < NO_KL
    assert same["same_top"] == 1


def test_online_rotations_run_while_a_model_is_judged(model: Checkpoint, stats: Stats) -> None:
    rotated = RotatedView(model, RotateConfig(residual=False, heads=False, hidden="full", target="rondel"))
    with Workers(1) as workers:
        assert Judge(model, held_out(stats), workers).measure(rotated)["mean_kl"] < NO_KL


def test_without_statistics_or_text(model: Checkpoint, stats: Stats) -> None:
    told = compare(model, QuantizeConfig("Q3_K"), None, threads=1)
    assert [row["method"] for row in told["methods"]] == ["rtn", "imatrix"]
    assert all(row["error"] is None and "mean_kl" not in row for row in told["methods"])
    assert "needs statistics" in told["left_out"]["awq+imatrix"]
    means = {"blk.0.ffn_down.weight": stats.diagonal(0, "hidden").numpy()}
    known = compare(model, QuantizeConfig("Q3_K"), Importance(matrices=means), methods=["imatrix", "awq"], threads=1)
    assert list(known["methods"][0]["roles"]) == ["ffn_down"]
    assert known["methods"][1]["error"] <= known["methods"][0]["error"]


@pytest.mark.parametrize(("method", "message"), [("awq", "needs statistics"), ("gptk", "expected one of rtn")])
def test_a_method_that_was_named_is_refused_before_the_first_one_runs(
    model: Checkpoint, method: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RondelError, match=message):
        compare(model, QuantizeConfig("Q3_K"), None, methods=["rtn", method], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
