"""Tuning the single copy: closer to the teacher on text that fitted nothing, in the same formats and bytes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.folder import Packed
from rondel.converters.replication import Replication
from rondel.quant import single_copy
from rondel.quant.block_codes import read_numbers, with_numbers
from rondel.quant.judgement import Splits, token_losses
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.replaced_view import ReplacedView
from rondel.quant.replicate import ReplicateConfig, build_replication, replicate
from rondel.quant.single_copy import tune
from rondel.quant.student import Student, Weights
from rondel.quant.workers import Workers
from tests.tiny import tiny_model

DRAWN = torch.randint(0, 288, (140, 32), generator=torch.Generator().manual_seed(2))
SPLITS = Splits(DRAWN[:120], DRAWN[120:130], DRAWN[130:])
CONFIG = SimpleNamespace(steps=30, seed=1)
BETTER = 0.97  # of the divergence before: a fit that moved nothing stays at 1
FLIPPED = 0.02  # of the codes of a planted perturbation
FEW_TOKENS = 8  # of a text that no model here expects
LEARNT = 0.05  # nats of such a text: about half of what thirty steps win
RETURNED = 0.5  # of its divergence at most that remains: half of what was planted comes back


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("qwen3", tmp_path_factory.mktemp("tiny") / "m", layers=2))


@pytest.fixture(scope="module")
def quantized(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return quantize(source, tmp_path_factory.mktemp("quantized") / "q", QuantizeConfig("Q4_0", pure=True))


def test_tuning_comes_closer_and_changes_no_size(source: Checkpoint, quantized: Checkpoint) -> None:
    student, teacher = Student(quantized), Student(source)
    found = tune(quantized, student, teacher, SPLITS, CONFIG)
    before = token_losses(student, teacher, SPLITS.confirm).told()["kl"]
    after = token_losses(student, teacher, SPLITS.confirm, weights=found.weights).told()["kl"]
    assert after < BETTER * before
    for name, value in found.data.items():
        info = quantized.info(name)
        assert tuple(value.shape) == info.shape
        if isinstance(value, Packed):
            assert value.format == info.format
            assert value.data.shape == quantized.packed(name).data.shape
    with Workers(2) as two:
        again = tune(quantized, student, teacher, SPLITS, CONFIG, workers=two)
    assert all(torch.equal(weights, again.weights[name]) for name, weights in found.weights.items())


def test_codes_that_were_flipped_find_back(quantized: Checkpoint) -> None:
    """The teacher is the quantized model itself: all that its student lacks is codes beside the right ones."""
    generator = np.random.default_rng(4)
    perturbed: dict[str, Packed] = {}
    for name in quantized.names():
        if quantized.info(name).format == "Q4_0" and name.startswith("blk"):
            packed = quantized.packed(name)
            codes = read_numbers(packed)["codes"]
            moved = generator.choice((-1, 1), codes.values.shape) * (generator.random(codes.values.shape) < FLIPPED)
            flipped = (codes.values + moved).clip(0, codes.top).astype(np.int32)
            perturbed[name] = with_numbers(packed, {"codes": flipped})
    source = ReplacedView(quantized, perturbed)
    student, teacher = Student(source), Student(quantized)
    found = tune(source, student, teacher, SPLITS, SimpleNamespace(steps=100, seed=1))
    before = token_losses(student, teacher, SPLITS.confirm).told()["kl"]
    after = token_losses(student, teacher, SPLITS.confirm, weights=found.weights).told()["kl"]
    assert after < RETURNED * before


def test_text_teaches_norms_what_the_teacher_does_not_know(source: Checkpoint, quantized: Checkpoint) -> None:
    few = Splits(*(piece % FEW_TOKENS for piece in (SPLITS.fit, SPLITS.select, SPLITS.confirm)))
    found = tune(quantized, Student(quantized), Student(source), few, CONFIG)
    assert found.report["labels"]
    assert 0 < found.report["by_text"] <= 1
    student, teacher = Student(quantized), Student(source)
    before = token_losses(student, teacher, few.confirm).told()
    after = token_losses(student, teacher, few.confirm, weights=found.weights).told()
    assert after["nll"] < before["nll"] - LEARNT
    assert after["kl"] < before["kl"]


def test_norms_that_lose_more_divergence_than_they_win_are_left_out(
    source: Checkpoint, quantized: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = torch.full_like(quantized.read("output_norm.weight"), 3)
    monkeypatch.setattr(single_copy, "_towards_text", lambda *_: {"output_norm.weight": norm})
    found = tune(quantized, Student(quantized), Student(source), SPLITS, CONFIG)
    assert found.report["labels"] is False
    assert found.report["by_text"] == 0
    assert not torch.equal(found.weights["output_norm.weight"], norm)


def test_copies_in_place_are_tuned_with_the_model(source: Checkpoint, quantized: Checkpoint, tmp_path: Path) -> None:
    """The teacher runs a layer twice: with a weak copy in place, both come nearer than either alone."""
    deeper = Student(replicate(source, tmp_path / "t", ReplicateConfig(("1:serial:1:1.0",))))
    student, weak = Student(quantized), build_replication(ReplicateConfig(("1:serial:1:0.5",)), quantized.numbers)
    assert weak is not None
    found = tune(quantized, student, deeper, SPLITS, CONFIG, copies=weak)
    assert found.copies is not None
    assert found.copies.steps == weak.steps
    for values in (values for one in found.copies.sets for values in one.values()):
        assert np.array_equal(values, values.astype(np.float16))
    alone = tune(quantized, student, deeper, SPLITS, CONFIG)
    assert alone.copies is None

    def kl(path: Replication | None, weights: Weights | None = None) -> float:
        return token_losses(student, deeper, SPLITS.confirm, path, weights=weights).told()["kl"]

    both = kl(found.copies, found.weights)
    assert both < BETTER * min(kl(weak), kl(None, alone.weights))
    assert both < kl(weak, found.weights)
    with Workers(2) as two:
        again = tune(quantized, student, deeper, SPLITS, CONFIG, copies=weak, workers=two)
    assert all(torch.equal(weights, again.weights[name]) for name, weights in found.weights.items())
    assert again.copies is not None
    for one, other in zip(found.copies.sets, again.copies.sets, strict=True):
        assert all(np.array_equal(values, other[kind]) for kind, values in one.items())


def test_a_model_that_lacks_nothing_stays(source: Checkpoint, tmp_path: Path) -> None:
    found = tune(source, Student(source), Student(source), SPLITS, CONFIG)
    assert not found.data
    assert not found.weights
    assert found.report["kept"] is False
