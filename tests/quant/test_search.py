"""The search over plans: one way to propose and observe, the same for a seed, and a planted copy is found by each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from rondel.converters.checkpoint import open_checkpoint
from rondel.quant.choice_config import ChoiceConfig
from rondel.quant.copy_plan import Copy
from rondel.quant.judgement import Splits
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.replicate import ReplicateConfig, replicate
from rondel.quant.search import Proposals
from rondel.quant.selection import choose
from rondel.quant.student import Student
from tests.tiny import tiny_model

LAYERS = 4
CONFIG = ChoiceConfig(budget_evals=40, seed=5, max_layers=2, passes=2)
TRUE = {Copy(2, "serial", "ffn")}
KINDS = ("grid", "bayes", "evolve")
Plans = list[tuple[tuple[Copy, ...], float]]


def worth(copies: tuple[Copy, ...]) -> float:
    """How far a plan is from TRUE: each copy too many or missing is one."""
    return len(copies) + len(TRUE) - 2 * len(set(copies) & TRUE)


def run(config: ChoiceConfig, first: tuple[Copy, ...] = ()) -> Plans:
    proposals, found = Proposals(config, LAYERS, first), []
    for _ in range(config.budget_evals):
        copies = proposals.propose()
        if copies is None:
            break
        found.append((copies, float(worth(copies))))
        proposals.observe(found[-1][1])
    return found


@pytest.mark.parametrize("search", KINDS)
def test_a_seed_decides_all_proposals(search: Literal["grid", "bayes", "evolve"]) -> None:
    config = replace(CONFIG, search=search)
    found = run(config)
    assert found == run(config)
    assert found != run(replace(config, seed=6))
    for copies, _ in found:
        assert len({copy.layer for copy in copies}) <= config.max_layers
        assert set(copies) <= set(config.copies(LAYERS))


def test_a_grid_visits_each_plan_once_and_ends() -> None:
    config = replace(CONFIG, search="grid", passes=1, budget_evals=100)
    found = run(config)
    plans = [copies for copies, _ in found]
    assert len(plans) == len(set(plans)) == (LAYERS + LAYERS * (LAYERS - 1) // 2) * 2 * 3
    few = run(replace(config, budget_evals=30))  # too few for pairs: single layers, all of them
    assert {len({copy.layer for copy in copies}) for copies, _ in few} == {1}
    assert len(few) == LAYERS * 2 * 3
    assert min(value for _, value in few) == 0


@pytest.mark.parametrize("search", ["bayes", "evolve"])
def test_what_was_observed_is_learned_from(search: Literal["bayes", "evolve"]) -> None:
    found = run(replace(CONFIG, search=search, budget_evals=100))
    values = [value for _, value in found]
    assert sum(values[-30:]) / 30 < sum(values[:8]) / 8 - 0.5  # later proposals lie nearer to the true plan
    advised = run(replace(CONFIG, search=search), (*TRUE, Copy(1, "parallel", "block")))
    assert [set(copies) for copies, _ in advised[:2]] == [TRUE, {Copy(1, "parallel", "block")}]


def test_mixed_plans_have_both_modes_in_a_layer() -> None:
    found = run(replace(CONFIG, mode="mixed", search="grid", passes=1, parts="block", candidates=(1,)))
    assert (Copy(1, "parallel", "block"), Copy(1, "serial", "block")) in [copies for copies, _ in found]


@pytest.mark.parametrize("search", KINDS)
def test_each_search_finds_the_planted_layer(
    search: Literal["grid", "bayes", "evolve"],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = open_checkpoint(tiny_model("llama", tmp_path / "m", layers=2))
    student = Student(quantize(source, tmp_path / "q", QuantizeConfig("Q4_0", pure=True, method="rtn")))
    teacher = Student(replicate(source, tmp_path / "t", ReplicateConfig(("1:serial:1:0.5",))))
    windows = torch.randint(0, 288, (120, 32), generator=torch.Generator().manual_seed(1))
    splits = Splits(windows[:48], windows[48:72], windows[72:])
    config = ChoiceConfig(search=search, mode="serial", parts="block", budget_evals=3, steps=10)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    capfd.readouterr()
    found = choose(student, teacher, splits, config)
    assert [entry["plan"] for entry in found.log if entry["accepted"]] in (
        [["1:serial:1:block"]],
        [["0:serial:1:block", "1:serial:1:block"]],
    )
    assert found.replication is not None
    assert 1 in {step.layer for step in found.replication.steps if step.number}
    fitted = [entry for entry in found.log if entry["by"] == search]
    assert 0 < len(fitted) <= config.budget_evals
    assert all(entry["kl"] is not None and entry["control_kl"] is not None for entry in fitted)
    assert capfd.readouterr() == ("", "")
    assert not list(empty.iterdir())
    with pytest.raises(AssertionError, match="proposed first"):
        Proposals(config, 2).observe(0.0)
