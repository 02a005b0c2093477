"""Alignment: which streams of a teacher and a student compare, whatever the depth and the basis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.quant.alignment import align
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.rotate_config import RotateConfig
from rondel.quant.rotated_view import RotatedView
from rondel.quant.student import Student
from tests.planted import deeper_model
from tests.tiny import tiny_model

WINDOWS = torch.randint(0, 288, (2, 32), generator=torch.Generator().manual_seed(1))
LAYERS = 4
SAME = 1e-4  # of the largest value: float32 sums in another order


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("qwen3", tmp_path_factory.mktemp("tiny") / "m", layers=LAYERS))


@pytest.fixture(scope="module")
def quantized(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = QuantizeConfig("Q4_0", pure=True, method="rtn")
    return quantize(source, tmp_path_factory.mktemp("quantized") / "q", config)


def test_a_teacher_of_all_layers_compares_as_it_stands(source: Checkpoint, quantized: Checkpoint) -> None:
    teacher = Student(source)
    found = align(Student(quantized), teacher, WINDOWS)
    assert found is not None
    assert found.ends == tuple(range(LAYERS))
    assert found.turn is None
    streams, end = found.streams(WINDOWS)
    assert torch.equal(streams[0], teacher.embed(WINDOWS))
    assert all(torch.equal(x, y) for x, y in zip(streams[1:], teacher.streams(WINDOWS), strict=True))
    assert torch.equal(end, streams[-1])


@pytest.mark.parametrize("gate", [0.5, 1.0])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_layer_that_stands_twice_in_a_deeper_teacher_is_known(
    layer: int, gate: float, source: Checkpoint, quantized: Checkpoint, tmp_path: Path
) -> None:
    teacher = Student(open_checkpoint(deeper_model(source.root, tmp_path / "deeper", layer, gate)))
    found = align(Student(quantized), teacher, WINDOWS)
    assert found is not None
    assert found.ends == tuple(i + (i >= layer) for i in range(LAYERS))
    assert found.streams(WINDOWS)[0][layer + 1].equal(teacher.streams(WINDOWS)[layer + 1])


def test_a_rotated_student_finds_the_teacher_in_its_basis(source: Checkpoint, tmp_path: Path) -> None:
    rotated = RotatedView(source, RotateConfig())
    student, teacher = Student(rotated), Student(source)
    found = align(student, teacher, WINDOWS)
    assert found is not None
    assert found.turn is not None
    streams, end = found.streams(WINDOWS)
    for mine, theirs in zip([student.embed(WINDOWS), *student.streams(WINDOWS)], streams, strict=True):
        assert (mine - theirs).abs().max() < SAME * mine.abs().max()
    assert torch.equal(end, teacher.streams(WINDOWS)[-1])


def test_strangers_do_not_compare(source: Checkpoint, quantized: Checkpoint, tmp_path: Path) -> None:
    student = Student(quantized)
    for name, told in {
        "width": {"width": 96},
        "depth": {"layers": 2},
        "seed": {"seed": 1, "layers": LAYERS + 1},
    }.items():
        stranger = open_checkpoint(tiny_model("qwen3", tmp_path / name, **told))  # type: ignore[arg-type]
        assert align(student, Student(stranger), WINDOWS) is None


def test_layers_that_are_unlike_do_not_compare(source: Checkpoint, tmp_path: Path) -> None:
    deeper = Student(open_checkpoint(deeper_model(source.root, tmp_path / "deeper", 1, 1.0)))
    student = Student(source)
    for name, tensor in student.tensors.items():
        if "attn_output" in name or "ffn_down" in name:
            student.tensors[name] = tensor.flip(0)
    assert align(student, deeper, WINDOWS) is None
