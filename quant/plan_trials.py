"""Owns the trial of a plan of copies: fitted on one piece of the text, measured on another, beside its gain control."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rondel.converters.progress import Progress, silent
from rondel.converters.replication import Replication
from rondel.quant.choice_config import ChoiceConfig
from rondel.quant.copy_plan import Copy, CopyPlan
from rondel.quant.distill import fit_copies, with_sets
from rondel.quant.gain_control import fit_gains
from rondel.quant.judgement import DELTA, Losses, RememberedTeacher, Splits, Verdict, paired, token_losses
from rondel.quant.screening import Screened
from rondel.quant.student import Student, base_path
from rondel.quant.workers import Workers

Branches = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class TriedPlan:
    """A plan that was fitted, and the mean losses on the piece that chooses."""

    plan: CopyPlan
    sets: list[dict[str, torch.Tensor]]
    losses: dict[str, float]  # "kl", "nll"
    control: dict[str, float]  # of the same branches with gains and no second execution

    @property
    def kl(self) -> float:
        """Of the teacher's distribution, nats a token."""
        return self.losses["kl"]

    @property
    def replication(self) -> Replication:
        """The steps with the fitted parameters."""
        return with_sets(self.plan.replication, self.sets)

    def failure(self, kl: float) -> str | None:
        """Why the plan is no better than a model that has `kl`, or than its gain control; None where it is."""
        if self.kl >= kl - DELTA:
            return f"KL {self.kl:.5f} is not {DELTA} below the {kl:.5f} without the copies"
        if self.kl >= self.control["kl"] - DELTA:
            return f"KL {self.kl:.5f} is not {DELTA} below the {self.control['kl']:.5f} of gains that cost nothing"
        return None


class PlanTrials:
    """All trials of one choice. Plans and gain controls that come again are not fitted again."""

    def __init__(
        self, student: Student, teacher: Student, splits: Splits, config: ChoiceConfig, workers: Workers
    ) -> None:
        self.student, self.teacher, self.splits = student, teacher, splits
        self.config, self.workers = config, workers
        self.fits = 0
        self._remembered = RememberedTeacher(teacher)
        self._tried: dict[tuple[Copy, ...], TriedPlan] = {}
        self._controls: dict[Branches, dict[str, torch.Tensor]] = {}
        self.base = self._losses(splits.select).told()

    def plan(self, copies: Sequence[Copy]) -> CopyPlan:
        """Copies put together as the configuration says."""
        return CopyPlan(copies, self.student, self.config)

    def tried(self, copies: Sequence[Copy]) -> bool:
        """Whether this plan was fitted before."""
        return tuple(sorted(copies)) in self._tried

    def measure(self, copies: Sequence[Copy], progress: Progress = silent) -> TriedPlan:
        """Fit a plan, and measure it on the piece that chooses."""
        key = tuple(sorted(copies))
        if key not in self._tried:
            plan = self.plan(copies)
            sets = fit_copies(
                self.student,
                self.teacher,
                self.splits.fit,
                plan.replication,
                plan.opening(),
                self.config,
                workers=self.workers,
                progress=progress,
            )
            losses = self._losses(self.splits.select, plan.replication, sets)
            control = self._losses(self.splits.select, weights=self._control(plan))
            self._tried[key] = TriedPlan(plan, sets, losses.told(), control.told())
            self.fits += 1
        return self._tried[key]

    def confirm(self, trial: TriedPlan) -> tuple[Verdict, Verdict]:
        """The plan against the model without copies, and against its gain control, by KL on text that chose nothing."""
        copies = self._losses(self.splits.confirm, trial.plan.replication, trial.sets)
        base = self._losses(self.splits.confirm)
        control = self._losses(self.splits.confirm, weights=self._control(trial.plan))
        seed = self.config.seed
        return paired(copies.kl, base.kl, seed), paired(copies.kl, control.kl, seed)

    def _control(self, plan: CopyPlan) -> dict[str, torch.Tensor]:
        key = tuple(plan.branches())
        if key not in self._controls:
            self._controls[key] = fit_gains(
                self.student, self.teacher, self.splits.fit, key, self.config, workers=self.workers
            )
        return self._controls[key]

    def _losses(
        self,
        windows: torch.Tensor,
        replication: Replication | None = None,
        sets: list[dict[str, torch.Tensor]] | None = None,
        weights: dict[str, torch.Tensor] | None = None,
    ) -> Losses:
        path = replication or base_path(self.student.layers)
        return token_losses(self.student, self._remembered, windows, path, sets, weights=weights)


def log_entry(
    plan: CopyPlan, by: str, *, screened: Screened | None = None, tried: TriedPlan | None = None, why: str | None = None
) -> dict[str, Any]:
    """One candidate as a plain dict; `why` it was not accepted, None: it was."""
    entry: dict[str, Any] = {
        "by": by,
        "plan": [str(copy) for copy in plan.copies],
        "layers": plan.layers,
        "mode": _told(copy.mode for copy in plan.copies),
        "parts": _told(copy.parts for copy in plan.copies),
        "passes": plan.most_copies,
        "compute": plan.compute,
        "bytes": plan.bytes,
        "kv_slots": plan.kv_slots,
        "screening": screened.told() if screened else None,
        "kl": None,
        "nll": None,
        "control_kl": None,
        "control_nll": None,
        "accepted": why is None,
        "why": why,
    }
    if tried:
        entry |= tried.losses | {f"control_{name}": value for name, value in tried.control.items()}
    return entry


def _told(values: Iterable[str]) -> str:
    found = sorted(set(values))
    return found[0] if len(found) == 1 else "mixed"
