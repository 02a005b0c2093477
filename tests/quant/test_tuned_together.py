"""Tuning with copies in place: what a missing execution costs is repaired by running it, not by tuning around it."""

from __future__ import annotations

import random
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.replication import Replication
from rondel.quant.judgement import DELTA, Splits, split, token_losses
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.replicate import ReplicateConfig, build_replication, replicate
from rondel.quant.replication_trial import Trial, windows_of
from rondel.quant.student import Student, base_path
from rondel.quant.tuned_together import Together, nearer_together
from tests.planted import deeper_model
from tests.tiny import tiny_model

CONTEXT = 64
CLOSED = 0.8  # of the gap to a planted teacher beyond what rounding alone costs
BETTER = 0.97  # of the divergence before: a fit that moved nothing stays at 1
FLOAT32_SUMS = 1e-5  # relative: the same model, read from the disk
EVAL = "rondel.replication.eval."
CONFIG = ReplicateConfig(context=CONTEXT, steps=30, tokens=18_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("qwen3", tmp_path_factory.mktemp("tiny") / "m", layers=3))


def test_a_stage_with_its_defaults_finds_the_planted_layer(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = random.Random(5)
    text = tmp_path / "letters.txt"
    text.write_text("".join(drawn.choice(string.ascii_letters + " ") for _ in range(20_000)), encoding="utf-8")
    teacher = open_checkpoint(deeper_model(source.root, tmp_path / "deeper", 1, 0.5))
    rounded = quantize(source, tmp_path / "q", QuantizeConfig("Q4_0", pure=True))
    made = replicate(rounded, tmp_path / "out", CONFIG, teacher, (text,))
    result = made.stages[-1]["result"]
    assert [entry["plan"] for entry in result["log"] if entry["accepted"] and not entry["tuned"]] == [
        ["1:serial:1:block"]
    ]
    assert made.manifest["replication"]
    assert result["choice"]["against_tuned"]["high"] < -DELTA
    assert result["choice"]["bases"][0]["tuned"] is False
    assert any("are tuned together with the model" in note for note in result["notes"])
    tuned = replicate(rounded, tmp_path / "tuned", replace(CONFIG, mode="none"), teacher, (text,))
    copied = replicate(rounded, tmp_path / "copied", replace(CONFIG, tune=False), teacher, (text,))
    windows = split(windows_of(source, (text,), CONFIG).windows, CONTEXT).confirm
    of = {
        model: token_losses(Student(model), Student(teacher), windows).kl.mean()
        for model in (rounded, made, tuned, copied)
    }
    rounding = token_losses(Student(rounded), Student(source), windows).kl.mean()
    assert (of[rounded] - of[made]) / (of[rounded] - rounding) > CLOSED
    assert of[made] < of[tuned] - DELTA
    assert of[made] < BETTER * of[copied]
    base = token_losses(Student(made), Student(teacher), windows, base_path(3)).told()
    assert base == pytest.approx(result["losses"]["base"], rel=FLOAT32_SUMS)
    assert made.manifest["replication"][EVAL + "kl_base"] == result["losses"]["base"]["kl"]

    named = replicate(rounded, tmp_path / "named", replace(CONFIG, layers=("1:serial:1",)), teacher, (text,))
    assert token_losses(Student(named), Student(teacher), windows).kl.mean() < of[tuned] - DELTA
    assert named.stages[-1]["result"]["choice"]["against_tuned"]["high"] < -DELTA

    measured = Trial.compare
    monkeypatch.setattr(Trial, "compare", lambda self, found: (measured(self, found)[0], self.told["rivals"][:1]))
    beaten = replicate(rounded, tmp_path / "beaten", CONFIG, teacher, (text,))
    assert "replication" not in beaten.manifest
    assert all(beaten.info(name).sha256 == tuned.info(name).sha256 for name in tuned.names())


def test_the_nearer_way_is_taken_and_only_if_it_surely_is(source: Checkpoint, tmp_path: Path) -> None:
    """The model lacks an execution; what stands for the tuned one knows it not, or has it, or is lucky on one piece."""
    teacher = Student(replicate(source, tmp_path / "t", ReplicateConfig(("1:serial:1:0.5",))))
    model, path = Student(source), build_replication(ReplicateConfig(("1:serial:1:0.4",)), source.numbers)
    assert path is not None
    windows = torch.randint(0, 288, (96, 32), generator=torch.Generator().manual_seed(1))
    splits = Splits(windows[:32], windows[32:48], windows[48:])

    def taken(student: Student, late: Replication | None = None) -> Together | None:
        return nearer_together(source, model, path, (student, late), teacher, splits, replace(CONFIG, steps=5))

    found = taken(model)
    assert found is not None
    assert found.verdict.better()
    assert found.copies.steps == path.steps
    assert taken(model, build_replication(ReplicateConfig(("1:serial:1:0.5",)), source.numbers)) is None
    assert taken(perfect_on(splits.confirm, source, teacher)) is None


def perfect_on(piece: torch.Tensor, source: Checkpoint, teacher: Student) -> Student:
    """A model that is the teacher on a piece of the text, and lacks the execution on the others."""

    class Turncoat(Student):
        def logits(self, tokens, *others):  # type: ignore[no-untyped-def]
            known = any(torch.equal(tokens[0], window[: tokens.shape[1]]) for window in piece)
            return teacher.logits(tokens) if known else super().logits(tokens, *others)

    return Turncoat(source)
