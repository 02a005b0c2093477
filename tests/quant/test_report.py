"""The report's data says of every tensor what the folder holds and what quantize told."""

from __future__ import annotations

from typing import Any

import pytest

from rondel.converters.checkpoint import open_checkpoint
from rondel.quant.quantize import QuantizeConfig, plan, quantize
from rondel.quant.report import asked_for, fallbacks, report_of
from tests.tiny import tiny_model

BITS = {"F32": 32, "F16": 16, "Q8_0": 8.5, "Q4_0": 4.5}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("report")
    source = open_checkpoint(tiny_model("llama", folder / "tiny", width=64, hidden=172, layers=2))
    config = QuantizeConfig(type="Q4_0", tensors=(("attn_v", "Q8_0"),))
    made = quantize(source, folder / "quantized", config)
    return report_of(made.manifest) | {"plan": plan(source, config)}


def test_totals_are_those_of_the_plan(told: dict[str, Any]) -> None:
    assert told["bytes"] == told["plan"]["bytes"] == sum(tensor["bytes"] for tensor in told["tensors"])
    assert told["bits_per_weight"] == pytest.approx(told["plan"]["bits_per_weight"])
    assert {total["format"]: total["bytes"] for total in told["formats"]} == told["plan"]["bytes_by_type"]
    assert [total["bytes"] for total in told["formats"]] == sorted(
        (total["bytes"] for total in told["formats"]), reverse=True
    )


def test_every_tensor_has_its_place(told: dict[str, Any]) -> None:
    places = {tensor["name"]: (tensor["layer"], tensor["role"]) for tensor in told["tensors"]}
    assert places["blk.1.ffn_down.weight"] == (1, "ffn_down")
    assert places["token_embd.weight"] == (None, "token_embd")
    assert set(places) == {line["name"] for line in told["plan"]["tensors"]}


def test_matrices_have_errors_and_norms_have_none(told: dict[str, Any]) -> None:
    for tensor in told["tensors"]:
        assert ("error" in tensor) == (len(tensor["shape"]) == 2), tensor["name"]
        assert tensor["bits_per_weight"] == pytest.approx(BITS[tensor["format"]])


def test_settings_and_warnings_are_told(told: dict[str, Any]) -> None:
    assert told["config"]["type"] == "Q4_0"
    assert told["calibration_tokens"] is None
    assert any(warning.startswith("no statistics") for warning in told["warnings"])
    assert any(warning.endswith("F16 instead of Q4_0; rows have 172 columns") for warning in told["warnings"])


def test_what_quantize_tells_beside_is_kept() -> None:
    entry = {"format": "Q4_0", "shape": [2, 32], "shard": "a", "sha256": ""}
    row = {"name": "x.weight", "format": "Q4_0", "shape": [2, 32], "bytes": 36, "error": 0.1, "method": "feedback"}
    manifest = {
        "family": "llama",
        "stages": [{"name": "quantize", "version": "1", "config": {"type": "Q4_0"}}],
        "quantization": {"tensors": {"x.weight": row}, "warnings": [], "alpha": 0.5},
        "tensors": {"x.weight": entry},
    }
    told = report_of(manifest)
    assert told["alpha"] == 0.5
    assert told["tensors"][0]["method"] == "feedback"
    assert told["tensors"][0]["output_error"] == 0.1
    row["held_out_error"] = {"feedback": 0.02, "plain": 0.05}
    assert report_of(manifest)["tensors"][0]["output_error"] == 0.02


def test_fallbacks_are_grouped() -> None:
    rows = [
        {"name": f"blk.{layer}.{role}.weight", "shape": [8, cols], "format": got, "instead_of": wanted}
        for layer in range(3)
        for role, cols, wanted, got in (("a", 96, "Q4_K", "Q5_0"), ("b", 65, "Q4_K", "F16"))
    ]
    assert fallbacks([*rows, {"name": "c.weight", "shape": [8, 256], "format": "Q4_K"}]) == [
        "blk.0.a.weight and 2 more: Q5_0 instead of Q4_K; rows have 96 columns",
        "blk.0.b.weight and 2 more: F16 instead of Q4_K; rows have 65 columns",
    ]
    assert fallbacks(rows[:1]) == ["blk.0.a.weight: Q5_0 instead of Q4_K; rows have 96 columns"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"type": "Q2_K"}, "Q2_K"),
        ({"type": "Q2_K", "like": "IQ2_M"}, "the bytes of IQ2_M"),
        ({"type": "Q2_K", "like": None, "bpw": 2.7}, "2.7 bits a weight"),
        ({"type": "Q2_K", "size": 1000}, "a given size"),
    ],
)
def test_what_was_asked_for(config: dict[str, Any], words: str) -> None:
    assert asked_for(config) == words
