"""Owns the way from a quantized model, its teacher and text to a result: tune, fit, judge.

The text is cut in three: one piece fits, one chooses, and one that did neither tells what came of it, token by token
against the same model without copies. All is measured against the tuned single copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RegressionError, RondelError
from rondel.converters.progress import Progress, silent
from rondel.converters.replication import Replication
from rondel.quant import single_copy
from rondel.quant.calibration_text import CalibrationText, tokenize
from rondel.quant.distill import fit_copies
from rondel.quant.judgement import Losses, RememberedTeacher, Verdict, paired, split, token_losses
from rondel.quant.replaced_view import ReplacedView
from rondel.quant.student import Student, base_path
from rondel.quant.workers import Workers

CONTEXT = 512  # tokens of a window, where the model has as many


class TrialConfig(Protocol):
    """What of a ReplicateConfig a trial follows."""

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
    def tune(self) -> bool | None:
        """Whether the single copy is tuned; None: it is."""
        ...

    @property
    def allow_regression(self) -> bool:
        """Whether a plan that harms is written."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a trial ended with; `told` has what was measured, for the stage's record."""

    model: Checkpoint  # the single copy, tuned or as it was
    replication: Replication | None  # with fitted parameters and its evaluation
    told: dict[str, Any]


def windows_of(source: Checkpoint, text: Sequence[Path], config: TrialConfig) -> CalibrationText:
    """The windows of the text in its order, evenly thinned out where there are more than `config.tokens`."""
    context = config.context or min(CONTEXT, source.numbers.context)
    return tokenize(source, text, tokens=config.tokens, context=context, seed=None)


class Trial:
    """The models, the text in three pieces, and what was measured so far.

    Raises RondelError for a teacher with another vocabulary, for too little text, and for models that no Student runs.
    """

    def __init__(
        self,
        source: Checkpoint,
        teacher: Checkpoint,
        text: CalibrationText,
        config: TrialConfig,
        *,
        workers: Workers,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> None:
        if teacher.numbers.vocabulary != source.numbers.vocabulary:
            raise RondelError(
                f"{teacher.root}: the teacher has {teacher.numbers.vocabulary} tokens, the model has "
                f"{source.numbers.vocabulary}; the teacher must be the float model that this one was quantized from"
            )
        self.model, self.text, self.config = source, text, config
        self.workers, self.device, self.progress = workers, device, progress
        self.splits = split(text.windows, text.windows.shape[1])
        self.teacher = Student(teacher, device=device)
        self.student = Student(source, device=device)
        self._remembered = RememberedTeacher(self.teacher)
        self.told: dict[str, Any] = {"losses": {}, "notes": []}
        self.base = self._note_losses("input", self.losses())
        self._note_losses("teacher", token_losses(self.teacher, self._remembered, self.splits.confirm))

    def losses(self, found: Replication | None = None, weights: Any = None) -> Losses:
        """Of the student on the text that judges: its base path, or with copies, or with other weights."""
        path = found or base_path(self.student.layers)
        return token_losses(self.student, self._remembered, self.splits.confirm, path, weights=weights)

    def _note_losses(self, name: str, found: Losses) -> Losses:
        self.told["losses"][name] = found.told()
        return found

    def tune(self) -> None:
        """Put the tuned single copy in the place of the model, unless it is worse on the text that judges."""
        self.progress(0, 1, "tuning the single copy")
        found = single_copy.tune(self.model, self.student, self.teacher, self.splits, self.config, workers=self.workers)
        self.told["tuning"] = dict(found.report)
        if not found.data:
            self.told["notes"].append(
                "the single copy stays as it is: tuning it did not help on text that tuned nothing"
            )
            return
        model = ReplacedView(self.model, found.data)
        student, before = self.student, self.base
        self.student = Student(model, device=self.device)
        tuned = self._note_losses("tuned", self.losses())
        verdict = paired(tuned.kl, before.kl, self.config.seed)
        self.told["tuning"] |= {"tensors": len(found.data), "kl": verdict.told()}
        if verdict.low > 0:
            self.student = student
            self.told["tuning"]["kept"] = False
            self.told["notes"].append(f"the single copy stays as it is: {_changed('tuning it', verdict)}")
            return
        self.model, self.base = model, tuned
        self.told["notes"].append(f"tuned the single copy: {_changed('it', verdict)}{self._won_back()}")

    def _won_back(self) -> str:
        """Which share of the loss that rounding added the tuning took away again."""
        nll = {name: losses["nll"] for name, losses in self.told["losses"].items()}
        lost = nll["input"] - nll["teacher"]
        if lost <= 0:
            return ""
        share = self.told["tuning"]["won_back"] = (nll["input"] - nll["tuned"]) / lost
        return f"; {share:.1%} of the likelihood that rounding lost is won back"

    def fit(self, found: Replication) -> Replication:
        """The copies of an explicit plan with parameters fitted to the teacher."""
        self.progress(0, 1, "fitting the copies")
        sets = fit_copies(self.student, self.teacher, self.splits.fit, found, None, self.config, workers=self.workers)
        return replace(found, sets=tuple({kind: np.asarray(values) for kind, values in one.items()} for one in sets))

    def judge(self, found: Replication) -> Replication:
        """The copies with their evaluation, against the tuned single copy.

        Raises RegressionError where they surely harm and `config.allow_regression` is not set.
        """
        base, copies = self.base, self._note_losses("copies", self.losses(found))
        divergence = paired(copies.kl, base.kl, self.config.seed)
        worse = divergence.low > 0
        if worse and not self.config.allow_regression:
            raise RegressionError(
                f"{self.model.root}: the fitted copies make the model worse: mean KL from the teacher "
                f"{base.told()['kl']:.5f} without and {copies.told()['kl']:.5f} with them on text that fitted nothing; "
                "choose other layers, or write them all the same with --allow-regression"
            )
        evaluation: dict[str, float | int | str | bool] = {
            "nll_base": base.told()["nll"],
            "nll_repl": copies.told()["nll"],
            "kl_base": base.told()["kl"],
            "kl_repl": copies.told()["kl"],
            "ci_lo": divergence.low,
            "ci_hi": divergence.high,
            "n_tokens": divergence.tokens,
            "n_ctx": int(self.text.windows.shape[1]),
            "corpus_sha256": self.text.sha256(),
            "regression": worse,
        }
        likelihood = paired(copies.nll, base.nll, self.config.seed)
        self.told |= {"evaluation": evaluation, "kl": divergence.told(), "nll": likelihood.told()}
        self.told["notes"].append(f"the fitted copies: {_changed('they', divergence)}")
        return replace(found, evaluation=evaluation)


def _changed(what: str, verdict: Verdict) -> str:
    """What a candidate changed, for people."""
    helps = "help" if verdict.high < 0 else "harm" if verdict.low > 0 else "change nothing that this text could show"
    if what != "they":
        helps = {"help": "helps", "harm": "harms"}.get(helps, helps.replace("change", "changes", 1))
    return (
        f"{what} {helps}: mean KL from the teacher {verdict.mean:+.5f} nats a token "
        f"({verdict.low:+.5f} to {verdict.high:+.5f}) on {verdict.tokens} tokens that fitted nothing"
    )


def decide(
    source: Checkpoint,
    teacher: Checkpoint,
    text: CalibrationText,
    plan: Replication | None,
    config: TrialConfig,
    *,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Outcome:
    """Tune the single copy, then fit and judge the copies of `plan`, if there is one.

    Raises RegressionError where they surely harm and `config.allow_regression` is not set, RondelError as Trial does.
    """
    with Workers(threads) as workers:
        trial = Trial(source, teacher, text, config, workers=workers, device=device, progress=progress)
        if config.tune is not False:
            trial.tune()
        found = trial.judge(trial.fit(plan)) if plan else None
    return Outcome(trial.model, found, trial.told)
