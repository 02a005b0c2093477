"""The differentiable forward pass: against the float64 reference, and whether gradients reach what is fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.errors import RondelError
from rondel.quant.decoded_view import DecodedView
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.reference import reference_logits
from rondel.quant.replicate import ReplicateConfig, build_replication, replicate
from rondel.quant.replication_reference import ReplicatedReference, replicated_logits
from rondel.quant.rotate import RotateConfig, rotate
from rondel.quant.student import Student, base_path
from tests.tiny import FAMILIES, tiny_model
from tests.tiny_sparse import tiny_sparse_model

ROUNDING64 = 1e-11  # relative: sums in another order, in float64
FLOAT32_ERROR = 1e-4  # of the largest logit: float32 against float64
TOKENS = torch.randint(0, 288, (2, 24), generator=torch.Generator().manual_seed(1))
PLANS = (("1:serial:1",), ("0:parallel:2:mean:gate=0.7:gain=1.2",), ("1:parallel:1:sum:ffn", "1:serial:2:attn"))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", PLANS)
def test_steps_are_those_of_the_reference(family: str, plan: tuple[str, ...], tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(family, tmp_path / "m", layers=3))
    built = build_replication(ReplicateConfig(plan), source.numbers)
    assert built is not None
    expected = torch.stack([ReplicatedReference(source, built).logits(window) for window in TOKENS])
    assert distance(Student(source, dtype=torch.float64).logits(TOKENS, built), expected) < ROUNDING64
    assert distance(Student(source).logits(TOKENS, built), expected) < FLOAT32_ERROR


def test_low_rank_terms_and_rounded_activations_are_those_of_the_reference(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("llama", tmp_path / "m", layers=2))
    built = build_replication(ReplicateConfig(("1:serial:1:0.5",)), source.numbers)
    assert built is not None
    draw, numbers = np.random.default_rng(1), source.numbers
    values = {
        **built.sets[0],
        "act_bits": np.array([6], np.float32),
        "rounding": np.array([3], np.float32),
        "ffn_up_left": draw.normal(size=(numbers.hidden, 2)).astype(np.float32),
        "ffn_up_right": draw.normal(size=(2, numbers.width)).astype(np.float32),
    }
    built = replace(built, sets=(values,))
    expected = torch.stack([ReplicatedReference(source, built).logits(window) for window in TOKENS])
    assert distance(Student(source, dtype=torch.float64).logits(TOKENS, built), expected) < ROUNDING64


def test_a_quantized_and_rotated_student_is_its_decoded_reference(tmp_path: Path) -> None:
    float_model = open_checkpoint(tiny_model("llama", tmp_path / "m", tied=True, width=64, hidden=128))
    turned = rotate(
        float_model, tmp_path / "r", RotateConfig(hidden="full", queries="full", keep_tied=True, target="rondel")
    )
    student = quantize(turned, tmp_path / "q", QuantizeConfig(type="Q4_0"))
    expected = torch.stack([reference_logits(DecodedView(student), window) for window in TOKENS])
    assert distance(Student(student, dtype=torch.float64).logits(TOKENS), expected) < ROUNDING64


def test_a_recorded_replication_is_run_unless_another_is_given(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("qwen3", tmp_path / "m", layers=3))
    planted = replicate(source, tmp_path / "p", ReplicateConfig(("1:serial:1:0.5",)))
    expected = torch.stack([replicated_logits(planted, window) for window in TOKENS])
    student = Student(planted, dtype=torch.float64)
    assert distance(student.logits(TOKENS), expected) < ROUNDING64
    streams = student.streams(TOKENS)
    assert len(streams) == 3
    assert torch.equal(student.head(streams[-1]), student.logits(TOKENS))
    plain = torch.stack([reference_logits(source, window) for window in TOKENS])
    assert distance(student.logits(TOKENS, base_path(3)), plain) < ROUNDING64


def test_gradients_reach_parameters_and_weights(tmp_path: Path) -> None:
    student = Student(open_checkpoint(tiny_model("qwen2", tmp_path / "m", layers=2)), dtype=torch.float64)
    built = build_replication(ReplicateConfig(("1:serial:1",)), student.numbers)
    assert built is not None
    gate = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    down = student.weight(1, "ffn_down").clone().requires_grad_()
    values = {"gate_attn": gate, "gate_ffn": gate}
    weights = {"blk.1.ffn_down.weight": down}
    logits = student.logits(TOKENS, built, [values], weights)
    assert torch.equal(logits, student.logits(TOKENS, base_path(2)))  # a closed gate is the model itself
    logits.square().sum().backward()
    assert gate.grad is not None
    assert gate.grad.abs().min() > 0
    assert down.grad is not None
    assert down.grad.abs().max() > 0


def test_what_it_cannot_run_is_refused(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_sparse_model("qwen3moe", tmp_path / "m"))
    with pytest.raises(RondelError, match="qwen3moe models are not fitted yet"):
        Student(source)
