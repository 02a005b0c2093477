"""Exported F32 files, plain and rotated, in the runtime against transformers; quantized ones against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.export import ExportConfig, export
from rondel.native import Model, Session
from rondel.quant.decoded_view import DecodedView
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.reference import reference_logits
from rondel.quant.rotate import RotateConfig, rotate
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "tests" / "models" / "stories-4m"

# Both sides compute in float32 and add in other orders; a wrong formula shows at 1e-2 and above.
LOGIT_TOLERANCE = 1e-4  # of the largest logit
# The runtime rounds the inputs of every quantized matrix to 8 bits: about a percent in each of two layers.
ROUNDING_TOLERANCE = 0.05


def export_f32(source: Path, out: Path) -> Path:
    (path,) = export(open_checkpoint(source), out, ExportConfig(type="F32"))
    return path


def transformers_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def assert_like_transformers(folder: Path, gguf: Path, tokens: list[int]) -> None:
    expected = transformers_logits(folder, tokens)
    limit = LOGIT_TOLERANCE * np.abs(expected).max()
    model = Model(gguf)
    session = Session(model, context=len(tokens), threads=2)
    whole = session.eval(tokens, all=True)
    assert np.abs(whole - expected).max() < limit
    stepwise = Session(model, context=len(tokens), threads=1)
    rows = np.concatenate([stepwise.eval([token]) for token in tokens])
    assert np.abs(rows - whole).max() < limit, "token by token must equal prefill"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tiny_models_have_transformers_logits(family: str, tied: bool, tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path / "model", tied=tied, seed=7)
    gguf = export_f32(folder, tmp_path / "model.gguf")
    tokens = np.random.default_rng(1).integers(0, Model(gguf).vocabulary, 40).tolist()
    assert_like_transformers(folder, gguf, tokens)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rotated_models_have_the_logits_of_the_model(family: str, tied: bool, tmp_path: Path) -> None:
    """Everything that rotate can turn, fused and online; a tied head stays tied."""
    folder = tiny_model(family, tmp_path / "model", tied=tied, seed=7)
    config = RotateConfig(hidden="full", queries="full", keep_tied=tied, target="rondel")
    rotated = rotate(open_checkpoint(folder), tmp_path / "rotated", config)
    (gguf,) = export(rotated, tmp_path / "model.gguf", ExportConfig(type="F32", target="rondel"))
    tokens = np.random.default_rng(1).integers(0, Model(gguf).vocabulary, 40).tolist()
    assert_like_transformers(folder, gguf, tokens)


def test_quantized_rotated_model_computes_with_the_decoded_weights(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("qwen3", tmp_path / "model", tied=True, seed=7))
    config = RotateConfig(hidden="full", queries="full", keep_tied=True, target="rondel")
    rotated = rotate(source, tmp_path / "rotated", config)
    quantized = quantize(rotated, tmp_path / "quantized", QuantizeConfig(type="Q4_0", pure=True))
    (gguf,) = export(quantized, tmp_path / "model.gguf", ExportConfig())
    tokens = np.random.default_rng(1).integers(0, 288, 40).tolist()
    expected = reference_logits(DecodedView(quantized), torch.tensor(tokens)).numpy()
    got = Session(Model(gguf), context=len(tokens), threads=1).eval(tokens, all=True)
    largest = np.abs(expected).max()
    assert np.abs(got - expected).max() < ROUNDING_TOLERANCE * largest
    float_logits = reference_logits(source, torch.tensor(tokens)).numpy()
    assert np.abs(expected - float_logits).max() > 2 * ROUNDING_TOLERANCE * largest, "four bits cost more than that"


def test_demo_model_has_transformers_logits(tmp_path: Path) -> None:
    gguf = export_f32(DEMO, tmp_path / "demo.gguf")
    tokens = np.random.default_rng(2).integers(0, 2048, 200).tolist()
    assert_like_transformers(DEMO, gguf, tokens)


ROTATED = {
    "fused": ("llama", {"attention_bias": True}, RotateConfig(rope_pairs=True)),
    "orthogonal": ("qwen3", {}, RotateConfig(kind="orthogonal")),
    "online": ("qwen2", {"hidden": 96}, RotateConfig(hidden=32, queries="full", target="rondel")),
    "tied": ("qwen3", {"tied": True}, RotateConfig(keep_tied=True, queries=8, target="rondel")),
}


@pytest.mark.parametrize("which", ROTATED)
def test_rotated_models_have_the_logits_of_the_plain_one(which: str, tmp_path: Path) -> None:
    """From a Hugging Face folder through rotate and export to the runtime, which turns what runs online."""
    family, settings, config = ROTATED[which]
    folder = tiny_model(family, tmp_path / "model", seed=7, **settings)
    rotated = rotate(open_checkpoint(folder), tmp_path / "rotated", config)
    gguf = export_f32(rotated.root, tmp_path / "model.gguf")
    tokens = np.random.default_rng(1).integers(0, Model(gguf).vocabulary, 40).tolist()
    assert_like_transformers(folder, gguf, tokens)
