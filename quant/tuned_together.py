"""Owns the other order: copies that help the model as it came, and the tuning of that model with them in place.

A model that is tuned without an execution that its teacher has learns to do without, and leaves a copy little to win.
"""

from __future__ import annotations

from dataclasses import dataclass

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.progress import Progress, silent
from rondel.converters.replication import Replication
from rondel.quant.descent import DescentConfig
from rondel.quant.judgement import DELTA, RememberedTeacher, Splits, Verdict, paired, token_losses
from rondel.quant.single_copy import Tuned, tune
from rondel.quant.student import Student, base_path
from rondel.quant.workers import Workers


@dataclass(frozen=True)
class Together:
    """A model that was tuned with copies in place, the copies, and how they compare with the tuned single copy."""

    tuned: Tuned
    copies: Replication
    verdict: Verdict


def nearer_together(  # noqa: PLR0917 (the model, its copies, what they must beat, and what all is measured with)
    source: Checkpoint,
    student: Student,
    early: Replication,
    single: tuple[Student, Replication | None],
    teacher: Student,
    splits: Splits,
    config: DescentConfig,
    *,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> Together | None:
    """The model as it came, tuned with the copies `early` in place, where that is the nearer way; else None.

    `student` is the forward pass of `source`; `single`: the tuned single copy, and its copies, if it has any. The text
    that chose decides between the two ways; on the text that chose nothing, copies must surely be better than the
    tuned single copy, which had the same care.
    """
    remembered, (rival, late) = RememberedTeacher(teacher), single
    found = tune(source, student, teacher, splits, config, copies=early, workers=workers, progress=progress)
    assert found.copies is not None, "they are in place"
    nearest = token_losses(rival, remembered, splits.select, late or base_path(rival.layers))
    if found.report["after" if found.data else "before"]["kl"] >= nearest.told()["kl"] - DELTA:
        return None
    copies = token_losses(student, remembered, splits.confirm, found.copies, weights=found.weights)
    alone = token_losses(rival, remembered, splits.confirm, base_path(rival.layers))
    verdict = paired(copies.kl, alone.kl, config.seed)
    return Together(found, found.copies, verdict) if verdict.better() else None
