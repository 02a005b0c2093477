"""Screening: a planted second execution stands out, and what gains could do does not count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.quant.alignment import align
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.replicate import ReplicateConfig, replicate
from rondel.quant.screening import MODES, PARTS, SMALLEST_SHARE, Screened, screen
from rondel.quant.student import Student, Values
from rondel.quant.workers import Workers
from tests.tiny import tiny_model

LAYERS = 3
WINDOWS = torch.randint(0, 288, (128, 32), generator=torch.Generator().manual_seed(1))
STANDS_OUT = 5  # times the largest share of any copy in another layer
SUMS = 1e-3  # shares of the error: float32 sums of branches that are equal in exact arithmetic


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("qwen3", tmp_path_factory.mktemp("tiny") / "m", layers=LAYERS))


@pytest.fixture(scope="module")
def student(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Student:
    config = QuantizeConfig("Q4_0", pure=True, method="rtn")
    return Student(quantize(source, tmp_path_factory.mktemp("quantized") / "q", config))


def screened(student: Student, teacher: Student, threads: int = 1) -> list[Screened]:
    aligned = align(student, teacher, WINDOWS)
    assert aligned is not None
    with Workers(threads) as workers:
        return screen(student, aligned, WINDOWS, workers)


@pytest.mark.parametrize(
    ("planted", "mode", "parts"),
    [
        ("1:serial:1:0.5", "serial", "block"),
        ("0:serial:1:ffn:0.5", "serial", "ffn"),
        ("2:parallel:1:sum:ffn:0.5", "parallel", "ffn"),
    ],
)
def test_a_planted_copy_stands_out(
    planted: str, mode: str, parts: str, source: Checkpoint, student: Student, tmp_path: Path
) -> None:
    layer = int(planted[0])
    found = screened(student, Student(replicate(source, tmp_path / "t", ReplicateConfig((planted,)))))
    assert [(one.layer, one.mode, one.parts) for one in found] == [
        (i, m, p) for i in range(LAYERS) for m in MODES for p in PARTS
    ]
    true = next(one for one in found if (one.layer, one.mode, one.parts) == (layer, mode, parts))
    assert true.failure() is None
    assert true.copy > STANDS_OUT * max(one.copy for one in found if one.layer != layer)
    assert all(one.failure() for one in found if one.layer != layer)


def test_nothing_stands_out_where_rounding_is_all_that_is_missing(source: Checkpoint, student: Student) -> None:
    found = screened(student, Student(source))
    assert len(found) == LAYERS * len(MODES) * len(PARTS)
    assert all(one.failure() for one in found)
    assert all(one.error > 0 for one in found)
    assert found == screened(student, Student(source), threads=2)
    with Workers(1) as workers:
        aligned = align(student, Student(source), WINDOWS)
        assert aligned is not None
        part = screen(student, aligned, WINDOWS, workers, modes=("serial",), parts=("ffn",))
    assert part == [one for one in found if (one.mode, one.parts) == ("serial", "ffn")]


class Scaled(Student):
    """A model whose layer 1 adds 1.3 times what it should: gains repair it, and copies cannot do better."""

    def feed_forward(self, layer: int, x: torch.Tensor, values: Values = {}, weights=None) -> torch.Tensor:  # noqa: B006
        added = super().feed_forward(layer, x, values, weights)
        return added * 1.3 if layer == 1 else added


def test_what_a_gain_repairs_is_no_copy(source: Checkpoint) -> None:
    found = [one for one in screened(Student(source), Scaled(source)) if one.layer == 1]
    assert all(one.gains > 1 - SUMS for one in found)
    assert all(abs(one.copy) < SUMS for one in found)
    assert all(one.failure() for one in found)


def test_what_is_worth_a_fit() -> None:
    worth = Screened(0, "serial", "block", gains=0.1, copy=0.2, low_rank=0.1, error=0.1)
    assert worth.promise == pytest.approx(0.02)
    assert worth.failure() is None
    for told in ({"copy": SMALLEST_SHARE}, {"low_rank": 0.3}):
        assert replace(worth, **told).failure()
    masked = replace(worth, error=-1.0)  # as in a tuned model, whose other layers make up for this one
    assert masked.promise == 0
    assert masked.failure() is None


def test_one_window_is_too_little(student: Student, source: Checkpoint) -> None:
    aligned = align(student, Student(source), WINDOWS[:1])
    assert aligned is not None
    with Workers(1) as workers, pytest.raises(RondelError, match="has one window to fit on"):
        screen(student, aligned, WINDOWS[:1], workers)
