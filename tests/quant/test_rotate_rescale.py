"""Rotate, then rescale: the ones that rotate left in the norms take a method's scales, and the file is plain GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.export import ExportConfig, export
from rondel.converters.stats import open_stats
from rondel.native import File, Model, Session
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.quantize_task import prepare
from rondel.quant.reference import reference_logits
from rondel.quant.rotate import RotateConfig, rotate
from tests.tiny import tiny_model

EIGHT_BITS = 0.05  # of the largest logit: what Q8_0 may cost; a scale that is folded on one side alone costs all of it
SCALED = 0.01  # standard deviation of gains that took scales


def test_gains_that_folding_freed_carry_scales(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("llama", tmp_path / "hf", layers=1))
    tokens = torch.randint(0, 288, (4, 32), generator=torch.Generator().manual_seed(6))
    text = CalibrationText(tokens, ("random",))
    stats = calibrate(source, tmp_path / "calib", CalibrateConfig(context=32), text, threads=1)
    rotated = rotate(source, tmp_path / "rotated", RotateConfig(rotate="always"), stats, threads=1)
    moved = open_stats(tmp_path / "rotated")
    config = QuantizeConfig("Q8_0", method="awq+gptq", alpha=0.5)
    made = quantize(rotated, tmp_path / "quantized", config, moved, threads=1)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        assert rotated.read(name).eq(1).all()
        assert made.read(name).std() > SCALED
    (file,) = export(made, tmp_path / "model.gguf", ExportConfig())
    with Model(file) as model, Session(model, context=32, threads=1) as session:
        found = torch.from_numpy(session.eval(tokens[0].tolist(), all=True))
    expected = reference_logits(source, tokens[0])
    assert (found - expected).abs().max() < EIGHT_BITS * expected.abs().max()
    with File(file) as opened:
        assert opened.keys["general.architecture"] == "llama"
        assert {tensor.format for tensor in opened.tensors} == {"F32", "Q8_0"}
    with pytest.raises(RondelError, match="nor do statistics that followed a rotation"):
        prepare(rotated, QuantizeConfig("Q8_0", method="smoothquant"), moved)
