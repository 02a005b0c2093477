"""The gain control: gains come back that were lost, and nothing runs twice for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.quant.gain_control import fit_gains
from rondel.quant.judgement import token_losses
from rondel.quant.student import Student
from rondel.quant.workers import Workers
from tests.tiny import tiny_model

LOST = 0.7
LEFT = 0.05  # of the divergence that the lost gains made
CONFIG = SimpleNamespace(steps=60, seed=1)
DRAWN = torch.randint(0, 288, (48, 32), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("llama", tmp_path_factory.mktemp("tiny") / "m", layers=2))


def test_a_lost_gain_comes_back(source: Checkpoint) -> None:
    teacher, student = Student(source), Student(source)
    student.tensors["blk.1.ffn_down.weight"] = LOST * student.tensors["blk.1.ffn_down.weight"]
    found = fit_gains(student, teacher, DRAWN[:32], [(1, "ffn")], CONFIG)
    assert sorted(found) == ["blk.1.ffn_down.weight", "blk.1.ffn_norm.weight"]
    before = token_losses(student, teacher, DRAWN[32:]).kl.mean()
    assert token_losses(student, teacher, DRAWN[32:], weights=found).kl.mean() < LEFT * before
    with Workers(2) as two:
        again = fit_gains(student, teacher, DRAWN[:32], [(1, "ffn")], CONFIG, workers=two)
    assert all(torch.equal(weight, again[name]) for name, weight in found.items())


def test_both_parts_have_gains_of_their_own(source: Checkpoint) -> None:
    teacher = Student(source)
    found = fit_gains(
        teacher, teacher, DRAWN[:4], [(0, "attn"), (1, "ffn"), (0, "attn")], SimpleNamespace(steps=1, seed=0)
    )
    assert {name.removeprefix("blk.").removesuffix(".weight") for name in found} == {
        "0.attn_norm", "0.attn_output", "1.ffn_norm", "1.ffn_down"
    }  # fmt: skip
