"""Fitting copies: does a planted second execution come back, and does nothing but the copies change?"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.progress import part_of
from rondel.quant.descent import batches, divergence
from rondel.quant.distill import fit_copies, opening_sets
from rondel.quant.replicate import ReplicateConfig, build_replication, replicate
from rondel.quant.student import Student, base_path
from rondel.quant.workers import Workers
from tests.tiny import tiny_model

CLOSED = 0.8  # of the gap to a planted teacher
CONFIG = SimpleNamespace(steps=40, seed=3, batch=4)
WINDOWS = torch.randint(0, 288, (8, 32), generator=torch.Generator().manual_seed(2))
UNSEEN = torch.randint(0, 288, (4, 32), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("qwen3", tmp_path_factory.mktemp("tiny") / "m", layers=3))


def gap(student: Student, teacher: Student, replication=None, parameters=None) -> float:
    with torch.no_grad():
        return float(divergence(student.logits(UNSEEN, replication, parameters), teacher.logits(UNSEEN)))


@pytest.mark.parametrize(
    ("planted", "plan"),
    [("1:serial:1:0.5", "1:serial:1"), ("1:parallel:1:sum:ffn:gain=0.3:gate=1", "1:parallel:1:sum")],
)
def test_a_planted_copy_comes_back(planted: str, plan: str, source: Checkpoint, tmp_path: Path) -> None:
    student = Student(source)
    teacher = Student(replicate(source, tmp_path / "t", ReplicateConfig((planted,))))
    built = build_replication(ReplicateConfig((plan,)), source.numbers)
    assert built is not None
    told: list[tuple[int, int]] = []
    whole = part_of(lambda done, total, _: told.append((done, total)), 1, 3, "the second of three")
    fitted = fit_copies(student, teacher, WINDOWS, built, None, CONFIG, progress=whole)
    assert told == [(1, 3), *((CONFIG.steps + step, 3 * CONFIG.steps) for step in range(1, CONFIG.steps + 1))]
    assert gap(student, teacher, built, fitted) < (1 - CLOSED) * gap(student, teacher)
    with Workers(2) as two:
        again = fit_copies(student, teacher, WINDOWS, built, None, CONFIG, workers=two)
    for one, other in zip(fitted, again, strict=True):
        assert all(torch.equal(values, other[kind]) for kind, values in one.items())
        assert all(torch.equal(values, values.half().float()) for values in one.values())


def test_a_fit_starts_from_the_model_itself(source: Checkpoint) -> None:
    student = Student(source)
    built = build_replication(ReplicateConfig(("0:serial:1", "2:parallel:1:sum")), source.numbers)
    assert built is not None
    sets = opening_sets(student, built)
    assert torch.equal(student.logits(UNSEEN, built, sets), student.logits(UNSEEN, base_path(3)))
    assert ["attn_norm_gain" in one for one in sets] == [True, False]  # parallel copies read the layer's keys
    still = fit_copies(student, student, WINDOWS, built, None, CONFIG)
    assert gap(student, student, built, still) < 1e-4  # nats: there is nothing to win


def test_teachers_of_another_vocabulary_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    teacher = Student(open_checkpoint(tiny_model("qwen3", tmp_path / "m", vocabulary=300)))
    with pytest.raises(RondelError, match="the teacher has 300 tokens, the model has 288"):
        fit_copies(Student(source), teacher, WINDOWS, base_path(3), None, CONFIG)


def test_batches_pass_over_all_windows_in_a_seeded_order() -> None:
    plan = batches(5, 4, 3, seed=1)
    assert [len(batch) for batch in plan] == [3] * 4
    assert sorted([*plan[0], *plan[1]][:5]) == list(range(5))
    assert plan == batches(5, 4, 3, seed=1) != batches(5, 4, 3, seed=2)
