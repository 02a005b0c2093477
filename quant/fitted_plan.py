"""Owns what becomes of an explicit plan that has a teacher and text: fitted on a part of it, judged on another.

The copies' gates start closed and are fitted with their gains; the base path stays as it is. Text that fitted nothing
then tells, token by token against the same model without copies, whether they help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RegressionError
from rondel.converters.replication import Replication
from rondel.quant.calibration_text import CalibrationText, tokenize
from rondel.quant.distill import fit_copies
from rondel.quant.judgement import RememberedTeacher, paired, split, token_losses
from rondel.quant.student import Student, base_path
from rondel.quant.workers import Workers

CONTEXT = 512  # tokens of a window, where the model has as many


class FitConfig(Protocol):
    """What of a ReplicateConfig the fit follows."""

    @property
    def context(self) -> int | None:
        """Tokens of a window."""
        ...

    @property
    def tokens(self) -> int:
        """The most of the text to use."""
        ...

    @property
    def steps(self) -> int:
        """Of every optimization."""
        ...

    @property
    def seed(self) -> int:
        """Of the order of windows, and of the bootstrap."""
        ...

    @property
    def allow_regression(self) -> bool:
        """Whether a plan that harms is written."""
        ...


@dataclass(frozen=True)
class Fitted:
    """A plan with its fitted parameters and what was measured; `told` has the same for the stage's record."""

    replication: Replication
    told: dict[str, Any]


def windows_of(source: Checkpoint, text: Sequence[Path], config: FitConfig) -> CalibrationText:
    """The windows of the text in its order, evenly thinned out where there are more than `config.tokens`."""
    context = config.context or min(CONTEXT, source.numbers.context)
    return tokenize(source, text, tokens=config.tokens, context=context, seed=None)


def fit_plan(
    source: Checkpoint,
    teacher: Checkpoint,
    text: CalibrationText,
    found: Replication,
    config: FitConfig,
    *,
    threads: int | None = None,
    device: str = "cpu",
) -> Fitted:
    """Fit the copies of `found` to the teacher and judge them.

    Raises RegressionError where they surely harm and `config.allow_regression` is not set, RondelError for a teacher
    with another vocabulary or too little text.
    """
    pieces = split(text.windows, text.windows.shape[1])
    student, judge = Student(source, device=device), Student(teacher, device=device)
    with Workers(threads) as workers:
        sets = fit_copies(student, judge, pieces.fit, found, None, config, workers=workers)
    fitted = replace(found, sets=tuple({kind: np.asarray(values) for kind, values in one.items()} for one in sets))
    remembered = RememberedTeacher(judge)
    base = token_losses(student, remembered, pieces.confirm, base_path(student.layers))
    copies = token_losses(student, remembered, pieces.confirm, fitted)
    divergence = paired(copies.kl, base.kl, config.seed)
    likelihood = paired(copies.nll, base.nll, config.seed)
    worse = divergence.low > 0
    if worse and not config.allow_regression:
        raise RegressionError(
            f"{source.root}: the fitted copies make the model worse: mean KL from the teacher {base.told()['kl']:.5f} "
            f"without and {copies.told()['kl']:.5f} with them on text that fitted nothing; choose other layers, or "
            "write them all the same with --allow-regression"
        )
    evaluation: dict[str, float | int | str | bool] = {
        "nll_base": base.told()["nll"],
        "nll_repl": copies.told()["nll"],
        "kl_base": base.told()["kl"],
        "kl_repl": copies.told()["kl"],
        "ci_lo": divergence.low,
        "ci_hi": divergence.high,
        "n_tokens": divergence.tokens,
        "n_ctx": int(text.windows.shape[1]),
        "corpus_sha256": text.sha256(),
        "regression": worse,
    }
    told = {"evaluation": evaluation, "kl": divergence.told(), "nll": likelihood.told()}
    return Fitted(replace(fitted, evaluation=evaluation), told)


def sentence(told: dict[str, Any]) -> str:
    """What the copies changed, for people: from `told["kl"]` of a Fitted."""
    helps = "help" if told["high"] < 0 else "harm" if told["low"] > 0 else "change nothing that this text could show"
    return (
        f"the fitted copies {helps}: mean KL from the teacher {told['mean']:+.5f} nats a token "
        f"({told['low']:+.5f} to {told['high']:+.5f}) on {told['tokens']} tokens that fitted nothing"
    )
