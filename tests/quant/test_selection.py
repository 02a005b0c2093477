"""The automatic choice: a layer that really runs twice is found among all, and "none" is the answer where none does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.replication import check
from rondel.quant.calibration_text import tokenize
from rondel.quant.choice_config import ChoiceConfig
from rondel.quant.judgement import Splits, token_losses
from rondel.quant.plan_trials import PlanTrials
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.replicate import ReplicateConfig, build_replication, replicate
from rondel.quant.rotate_config import RotateConfig
from rondel.quant.rotated_view import RotatedView
from rondel.quant.selection import Choice, choose
from rondel.quant.student import Student, base_path
from rondel.quant.workers import Workers
from tests.planted import deeper_model
from tests.tiny import tiny_model

MODELS = Path(__file__).parent.parent / "models"
CLOSED = 0.8  # of what the planted copy itself closes on the student
MOST_FOUND = 1  # false alarms of SEEDS models without a planted copy
SEEDS = 20
LAYERS = 4
CONFIG = ChoiceConfig(steps=16, seed=1)
ROUNDED = QuantizeConfig("Q4_0", pure=True, method="rtn")


def cut(windows: torch.Tensor) -> Splits:
    half, last = len(windows) // 2, len(windows) * 3 // 4
    return Splits(windows[:half], windows[half:last], windows[last:])


def drawn(seed: int, count: int = 160) -> Splits:
    return cut(torch.randint(0, 288, (count, 32), generator=torch.Generator().manual_seed(seed)))


SPLITS = drawn(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("qwen3", tmp_path_factory.mktemp("tiny") / "m", layers=LAYERS))


@pytest.fixture(scope="module")
def student(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Student:
    return Student(quantize(source, tmp_path_factory.mktemp("quantized") / "q", ROUNDED))


@pytest.fixture(scope="module")
def teacher(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Student:
    """Layer 1 runs twice."""
    config = ReplicateConfig(("1:serial:1:0.5",))
    return Student(replicate(source, tmp_path_factory.mktemp("planted") / "t", config))


def closed(student: Student, teacher: Student, found: Choice, planted: str, windows: torch.Tensor) -> float:
    """(KL without copies - KL with the found ones) / (KL without - KL with the planted one itself on the student)."""
    truth = build_replication(ReplicateConfig((planted,)), student.numbers)
    base, own, true = (
        token_losses(student, teacher, windows, path).kl.mean()
        for path in (base_path(student.layers), found.replication, truth)
    )
    return float((base - own) / (base - true))


def accepted(found: Choice) -> list[list[str]]:
    return [entry["plan"] for entry in found.log if entry["accepted"]]


def test_a_planted_layer_is_found_among_all(student: Student, teacher: Student) -> None:
    with Workers(2) as workers:
        found = choose(student, teacher, SPLITS, CONFIG, workers=workers)
    assert accepted(found) == [["1:serial:1:block"]]
    assert found.replication is not None
    assert closed(student, teacher, found, "1:serial:1:0.5", SPLITS.confirm) > CLOSED
    check(found.replication, student.numbers)
    for values, stored in zip(found.parameters, found.replication.sets, strict=True):
        assert all(np.array_equal(values[kind], stored[kind].astype(np.float16)) for kind in stored)
    assert found.verdict is not None
    assert found.verdict.better()
    assert found.control is not None
    assert found.control.high < 0
    entry = next(entry for entry in found.log if entry["accepted"])
    assert entry["kl"] < entry["control_kl"] < found.base["kl"]
    assert (entry["layers"], entry["mode"], entry["parts"], entry["passes"]) == ([1], "serial", "block", 1)
    assert (entry["compute"], entry["kv_slots"]) == (pytest.approx(1 / LAYERS), 1)
    assert entry["bytes"] == 2 * (4 * student.numbers.width + 2)
    assert {tuple(e["plan"]) for e in found.log} == {(str(copy),) for copy in CONFIG.copies(LAYERS)}
    assert all(entry["why"] for entry in found.log if not entry["accepted"])
    again = choose(student, teacher, SPLITS, CONFIG)
    assert again.log == found.log
    assert again.verdict == found.verdict


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_layer_that_stands_twice_in_an_ordinary_checkpoint_is_found(
    layer: int, source: Checkpoint, student: Student, tmp_path: Path
) -> None:
    deeper = Student(open_checkpoint(deeper_model(source.root, tmp_path / "deeper", layer, 0.5)))
    found = choose(student, deeper, SPLITS, CONFIG)
    assert accepted(found) == [[f"{layer}:serial:1:block"]]
    assert closed(student, deeper, found, f"{layer}:serial:1:0.5", SPLITS.confirm) > CLOSED


def test_a_rotated_student_learns_from_a_teacher_in_another_basis(source: Checkpoint, teacher: Student) -> None:
    rotated = Student(RotatedView(source, RotateConfig()))
    found = choose(rotated, teacher, SPLITS, CONFIG)
    assert accepted(found) == [["1:serial:1:block"]]
    assert closed(rotated, teacher, found, "1:serial:1:0.5", SPLITS.confirm) > CLOSED


def test_a_teacher_that_does_not_compare_gives_none_and_says_why(student: Student, tmp_path: Path) -> None:
    wider = Student(open_checkpoint(tiny_model("qwen3", tmp_path / "m", layers=LAYERS, width=96)))
    found = choose(student, wider, SPLITS, CONFIG)
    assert found.replication is None
    assert len(found.log) == LAYERS * 6
    assert all(entry["why"].startswith("the teacher's layers do not compare") for entry in found.log)


@pytest.mark.slow
def test_nothing_is_found_where_nothing_was_planted(tmp_path: Path) -> None:
    alarms = []
    for seed in range(SEEDS):
        source = open_checkpoint(tiny_model("qwen3", tmp_path / f"m{seed}", seed=seed))
        rounded = Student(quantize(source, tmp_path / f"q{seed}", ROUNDED))
        found = choose(rounded, Student(source), drawn(seed), replace(CONFIG, seed=seed))
        assert len(found.log) >= 2 * 6
        if found.replication is not None:
            alarms.append(seed)
    assert len(alarms) <= MOST_FOUND


@pytest.mark.slow
def test_a_trained_model_of_two_bits(tmp_path: Path) -> None:
    source = open_checkpoint(MODELS / "stories-4m")
    student = Student(quantize(source, tmp_path / "q", QuantizeConfig("Q2_K", method="rtn")))
    text = tokenize(source, [MODELS / "stories.txt"], tokens=4608, context=64, seed=None)
    splits = cut(text.windows)
    assert choose(student, Student(source), splits, CONFIG).replication is None
    deeper = Student(open_checkpoint(deeper_model(source.root, tmp_path / "deeper", 2, 1.0)))
    found = choose(student, deeper, splits, CONFIG)
    assert accepted(found) == [["2:serial:1:block"]]
    assert closed(student, deeper, found, "2:serial:1:1.0", splits.confirm) > CLOSED


def test_caps_are_kept_and_the_log_says_so(student: Student, teacher: Student) -> None:
    no_cache = choose(student, teacher, SPLITS, replace(CONFIG, max_kv=0))
    assert accepted(no_cache) == [["1:serial:1:ffn"]]
    whys = {entry["plan"][0]: entry["why"] for entry in no_cache.log}
    assert whys["1:serial:1:block"] == "1 more KV caches, at most 0 are allowed"
    cheap = choose(student, teacher, SPLITS, replace(CONFIG, max_compute=0.01))
    assert cheap.replication is None
    assert cheap.verdict is None
    assert all("0.01 is allowed" in entry["why"] for entry in cheap.log)
    elsewhere = choose(student, teacher, SPLITS, replace(CONFIG, candidates=(0, 3)))
    assert elsewhere.replication is None
    assert {entry["layers"][0] for entry in elsewhere.log} == {0, 3}
    with pytest.raises(RondelError, match="layer 4 cannot have copies: the model has the layers 0 to 3"):
        choose(student, teacher, SPLITS, replace(CONFIG, candidates=(1, 4)))


@pytest.mark.slow
def test_two_planted_layers_are_both_found_where_two_may_be(
    source: Checkpoint, student: Student, tmp_path: Path
) -> None:
    config = ReplicateConfig(("0:serial:1:0.5", "2:serial:1:0.5"))
    two = Student(replicate(source, tmp_path / "t", config))
    whole = replace(CONFIG, mode="serial", parts="block")
    found = choose(student, two, SPLITS, whole)
    assert accepted(found)[-1] == ["0:serial:1:block", "2:serial:1:block"]
    one = choose(student, two, SPLITS, replace(whole, max_layers=1))
    assert len(accepted(one)) == 1
    assert any(entry["why"] == "2 layers with copies, at most 1 are allowed" for entry in one.log)


def test_modes_and_parts_are_obeyed(student: Student, teacher: Student) -> None:
    every = replace(CONFIG, mode="parallel", parts="ffn", candidates=(2, 1)).copies(LAYERS)
    assert [str(copy) for copy in every] == ["1:parallel:1:ffn", "2:parallel:1:ffn"]
    assert {copy.parts for copy in replace(CONFIG, merge="mean").copies(LAYERS) if copy.mode == "parallel"} == {"block"}
    found = choose(student, teacher, SPLITS, replace(CONFIG, mode="parallel", max_compute=0.0))
    assert {entry["mode"] for entry in found.log} == {"parallel"}


def test_the_text_that_chose_nothing_has_the_last_word(student: Student, teacher: Student, source: Checkpoint) -> None:
    """A plan that only its own pieces like: the confirming piece is of another teacher, in effect."""

    class Turncoat(Student):
        def logits(self, tokens, *others):  # type: ignore[no-untyped-def]
            honest = super().logits(tokens, *others)
            seen = any(torch.equal(tokens[0], window[: tokens.shape[1]]) for window in SPLITS.confirm)
            return student.logits(tokens, base_path(LAYERS)) if seen else honest

    turncoat = Turncoat(teacher.source)
    found = choose(student, turncoat, SPLITS, CONFIG)
    assert found.replication is None
    assert found.verdict is not None
    assert not found.verdict.better()
    assert found.log[-1]["by"] == "confirm"
    assert found.log[-1]["why"] == "text that chose nothing does not confirm it"


def test_settings_come_from_a_stage_by_name() -> None:
    config = ReplicateConfig(steps=7, seed=3, kv="shared", layers=("2:serial:1",))
    assert ChoiceConfig.of(config) == ChoiceConfig(steps=7, seed=3, kv="shared")


def test_plans_cost_what_their_steps_do(student: Student) -> None:
    with Workers(1) as workers:
        trials = PlanTrials(student, student, SPLITS, CONFIG, workers)
    every = {str(copy): trials.plan([copy]) for copy in CONFIG.copies(LAYERS)}
    whole, ffn = every["1:serial:1:block"], every["1:serial:1:ffn"]
    attention = every["1:serial:1:attn"]
    assert attention.compute + ffn.compute == pytest.approx(whole.compute)
    assert every["1:parallel:1:attn"].compute < attention.compute  # keys and values are there already
    assert [plan.kv_slots for plan in (whole, attention, ffn, every["1:parallel:1:block"])] == [1, 1, 0, 0]
    assert whole.branches() == [(1, "attn"), (1, "ffn")]
    assert CONFIG.failure(whole) is None
    twice = trials.plan([*whole.copies, *whole.copies])
    assert CONFIG.failure(twice) == "2 copies of a layer, at most 1 are allowed"
    assert replace(CONFIG, passes=2).failure(twice) is None
