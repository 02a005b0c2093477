"""Owns the way through a trial of copies: what is tried in which order, and what a checkpoint is made of in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.lora import Factors
from rondel.converters.progress import Progress, silent
from rondel.converters.replication import Replication
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.replicate_config import ReplicateConfig
from rondel.quant.replication_cost import stored_bytes
from rondel.quant.replication_trial import Trial
from rondel.quant.workers import Workers


@dataclass(frozen=True)
class Outcome:
    """What a trial ended with; `told` has what was measured, for the stage's record."""

    model: Checkpoint  # the single copy, tuned or as it was, or what was tuned with the copies in place
    replication: Replication | None  # with fitted parameters and its evaluation
    told: dict[str, Any]
    correction: Mapping[str, Factors] = field(default_factory=dict)  # by tensor name, where it is preferred


def decide(
    source: Checkpoint,
    teacher: Checkpoint,
    text: CalibrationText,
    plan: Replication | None,
    config: ReplicateConfig,
    *,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Outcome:
    """Tune the single copy, then fit the copies of `plan`, or choose copies, and judge them beside their rivals.

    Chosen copies are left out where a rival is surely better, unless `config.prefer` says otherwise. Raises
    RegressionError where those of `plan` surely harm and `config.allow_regression` is not set, RondelError as Trial.
    """
    with Workers(threads) as workers:
        trial = Trial(source, teacher, text, config, workers=workers, device=device, progress=progress)
        choosing, tuning = plan is None and config.mode != "none", config.tune is not False
        fitted = trial.fit(plan) if plan and tuning else None
        chosen = trial.look() if choosing and tuning else None
        if tuning:
            trial.tune()
        found = trial.fit(plan, fitted) if plan else trial.choose(chosen) if choosing else None
        if found:
            found, better = trial.compare(trial.judge(found))
            trial.told["warnings"] += [_beaten(row, found, trial) for row in better]
            if better and not plan and config.prefer == "none":
                trial.told["notes"].append("no layer is replicated: its bytes have a better use; see --prefer")
                found = None
        correction = trial.correct(found) if config.prefer == "low-rank" else {}
    if correction:
        found = None
    return Outcome((trial.taken if found else trial.single).model, found, trial.told, correction)


def _beaten(rival: Mapping[str, Any], found: Replication, trial: Trial) -> str:
    """A rival that is surely better than the copies, for people."""
    return (
        f"{rival['name']} is better than the copies: mean KL from the teacher {rival['kl']:.5f} with {rival['bytes']} "
        f"bytes more, {found.evaluation['kl_repl']:.5f} with the copies' {stored_bytes(found)}, "
        f"{trial.single.losses.told()['kl']:.5f} without either"
    )
