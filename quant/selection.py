"""Owns the automatic choice of copies: which layers run again, if any do.

Layers are screened first (screening.py); what promises enough is fitted and added one copy at a time, as long as text
that fitted nothing comes out better than before and than the gain control. Text that neither fitted nor chose then
decides once. "None" is an answer, and usually the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rondel.converters.progress import Progress, part_of, silent
from rondel.converters.replication import Replication
from rondel.quant.alignment import align
from rondel.quant.choice_config import ChoiceConfig
from rondel.quant.copy_plan import Copy, CopyPlan
from rondel.quant.descent import open_workers
from rondel.quant.judgement import Splits, Verdict
from rondel.quant.plan_trials import PlanTrials, TriedPlan, log_entry
from rondel.quant.screening import MODES, Screened, screen
from rondel.quant.search import search
from rondel.quant.student import Student
from rondel.quant.workers import Workers

FAILURES = 2  # of fits in a row of promise, after which nothing better is expected
AS_GOOD = 0.8  # of the best promise of a layer: a cheaper copy that keeps this much is taken instead


@dataclass(frozen=True)
class Choice:
    """The copies that were chosen, None for no copies; and every candidate that was looked at."""

    replication: Replication | None  # with its fitted parameters
    parameters: list[dict[str, torch.Tensor]]  # the same, a dict a set
    log: list[dict[str, Any]]
    verdict: Verdict | None  # of the last candidate against the model without copies, on text that chose nothing
    control: Verdict | None = None  # and against the same branches with gains and no second execution
    base: dict[str, float] = field(default_factory=dict)  # "kl" and "nll" without copies on the text that chose


def choose(
    student: Student,
    teacher: Student,
    splits: Splits,
    config: ChoiceConfig,
    *,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> Choice:
    """The copies that surely bring the student nearer to its teacher, or none.

    Raises RondelError for layers that the model does not have.
    """
    config.check(student.layers)
    with open_workers(workers) as crew:
        progress(0, 1, "screening the layers")
        log, promising = _screened(student, teacher, splits, config, crew)
        if config.search == "screen" and not promising:
            return Choice(None, [], log, None)
        trials = PlanTrials(student, teacher, splits, config, crew)
        look = _forward if config.search == "screen" else search
        best = look(trials, promising, config, log, progress)
        if best is None:
            return Choice(None, [], log, None, base=trials.base)
        progress(0, 1, "confirming the choice")
        verdict, control = trials.confirm(best)
        # By DELTA against the model, whose cost is none; the gains were as far behind on the text that chose.
        if verdict.better() and control.better(0):
            return Choice(best.replication, best.sets, log, verdict, control, trials.base)
        why = "text that chose nothing does not confirm it"
        log.append(log_entry(best.plan, "confirm", tried=best, why=why))
        return Choice(None, [], log, verdict, control, trials.base)


def _screened(
    student: Student, teacher: Student, splits: Splits, config: ChoiceConfig, workers: Workers
) -> tuple[list[dict[str, Any]], list[Screened]]:
    """The log of what was screened out, and the most promising copy of each other layer, the best first."""
    aligned = align(student, teacher, splits.fit)
    every = config.copies(student.layers)
    if aligned is None:
        alien = "the teacher's layers do not compare with the model's: another width, basis or kind of layers"
        return [log_entry(CopyPlan([copy], student, config), "screen", why=alien) for copy in every], []
    found = screen(student, aligned, splits.fit, workers, modes=config.modes, parts=config.kinds)
    log, good = [], dict[int, list[tuple[Screened, CopyPlan]]]()
    for one in found:
        plan = CopyPlan([Copy(one.layer, one.mode, one.parts)], student, config)
        why = config.failure(plan)
        if plan.copies[0] not in every:
            continue
        why = why or one.failure()
        if why:
            log.append(log_entry(plan, "screen", screened=one, why=why))
        else:
            good.setdefault(one.layer, []).append((one, plan))
    best = []
    for layer in good:
        enough = AS_GOOD * max(one.copy for one, _ in good[layer])
        taken = min((pair for pair in good[layer] if pair[0].copy >= enough), key=lambda pair: pair[1].compute)
        best.append(taken[0])
        better = f"{taken[0].mode} {taken[0].parts} promises the layer more, or as much for less"
        log += [log_entry(plan, "screen", screened=one, why=better) for one, plan in good[layer] if one is not taken[0]]
    return log, sorted(best, key=lambda one: (-one.promise, -one.copy))


def _forward(
    trials: PlanTrials,
    promising: Sequence[Screened],
    config: ChoiceConfig,
    log: list[dict[str, Any]],
    progress: Progress,
) -> TriedPlan | None:
    """Forward selection: add the copies in the order of their promise, each kept if it helps."""
    queue: list[tuple[Copy, Screened | None]] = [(Copy(one.layer, one.mode, one.parts), one) for one in promising]
    best: TriedPlan | None = None
    failures = 0
    while queue and failures < FAILURES and trials.fits < config.budget_evals:
        copy, screened = queue.pop(0)
        copies = [*(best.plan.copies if best else ()), copy]
        plan = trials.plan(copies)
        why = config.failure(plan)
        if why:
            log.append(log_entry(plan, "screen", screened=screened, why=why))
            continue
        tried = trials.measure(copies, part_of(progress, trials.fits, trials.fits + len(queue) + 1, f"fitting {copy}"))
        why = tried.failure(best.kl if best else trials.base["kl"])
        log.append(log_entry(plan, "screen", screened=screened, tried=tried, why=why))
        if why:
            failures += 1
            continue
        best, failures = tried, 0
        others = [mode for mode in MODES if mode != copy.mode] if config.mode == "mixed" else [copy.mode]
        more = [Copy(copy.layer, mode, copy.parts) for mode in others if _room(plan, copy, config)]
        queue += [(one, None) for one in more if one in config.copies(trials.student.layers)]
    return best


def _room(plan: CopyPlan, copy: Copy, config: ChoiceConfig) -> bool:
    """Whether the layer of `copy` may have one more."""
    return sum(one.layer == copy.layer for one in plan.copies) < config.copies_a_layer
