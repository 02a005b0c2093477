"""Other uses of the bytes of copies: larger formats are rounded with the care that the model's own have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import open_checkpoint
from rondel.native.formats import decode, encode, feeds_back
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.replicate_config import ReplicateConfig
from rondel.quant.rivals import Rivals
from rondel.quant.student import Student
from rondel.quant.workers import Workers
from tests.tiny import tiny_model

ANY_BUDGET = 1 << 20  # bytes: every matrix of the tiny model may have a larger format
SOME_ROUNDING_SUFFERS = 0.97  # of plain rounding's error, summed: feedback that was never tried stays at 1


def test_larger_formats_are_rounded_with_error_feedback(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("qwen3", tmp_path / "m", layers=2))
    student = Student(quantize(source, tmp_path / "q", QuantizeConfig("Q2_K", pure=True)))
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, source.numbers.vocabulary, (16, 64), generator=generator)
    with Workers(1) as workers:
        rivals = Rivals(student, Student(source), windows, ReplicateConfig(), workers)
        found = rivals.more_bits(ANY_BUDGET)
    assert found is not None
    assert found.weights
    missed, plain = 0.0, 0.0
    for name, format in (told.split() for told in found.changed):
        assert feeds_back(format)
        one = rivals.deficits[name]
        importance = one.moment.diagonal().float().numpy()
        rounded = decode(format, encode(format, one.wanted.numpy(), importance), *one.wanted.shape)
        assert one.missed(found.weights[name]) <= one.missed(torch.from_numpy(rounded))
        missed += one.missed(found.weights[name])
        plain += one.missed(torch.from_numpy(rounded))
    assert missed < SOME_ROUNDING_SUFFERS * plain


def test_what_a_matrix_misses_is_the_error_of_its_outputs(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("llama", tmp_path / "m", layers=1))
    student = Student(quantize(source, tmp_path / "q", QuantizeConfig("Q4_0", pure=True)))
    windows = torch.arange(64)[None] % source.numbers.vocabulary
    with Workers(1) as workers:
        one = Rivals(student, Student(source), windows, ReplicateConfig(), workers).deficits["blk.0.ffn_down.weight"]
    assert one.missed(one.wanted) == pytest.approx(0)
    values, vectors = torch.linalg.eigh(one.moment)
    inputs = vectors * values.clamp(min=0).sqrt()  # columns with this moment
    outputs = one.missing.double() @ inputs
    assert one.missed(one.stored) == pytest.approx(float(outputs.square().sum()))
