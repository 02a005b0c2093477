"""Owns the way from a quantized model, its teacher and text to a result: tune, choose or fit, judge, compare.

The text is cut in three: one piece fits, one chooses, and one that did neither tells what came of it, token by token
against the same model without copies. All is measured against the tuned single copy, and beside what other uses of the
same bytes gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RegressionError
from rondel.converters.lora import Factors as LoraFactors
from rondel.converters.progress import Progress, silent
from rondel.converters.replication import Replication
from rondel.quant import selection, single_copy
from rondel.quant.calibration_text import CalibrationText, tokenize
from rondel.quant.choice_config import ChoiceConfig
from rondel.quant.distill import fit_copies, with_sets
from rondel.quant.judgement import DELTA, Losses, RememberedTeacher, Verdict, paired, split, token_losses
from rondel.quant.replaced_view import ReplacedView
from rondel.quant.replicate_config import ReplicateConfig
from rondel.quant.replication_cost import copy_of_every_layer, extra_compute, model_bytes, read_bytes, stored_bytes
from rondel.quant.rivals import Rival, Rivals
from rondel.quant.student import Student, base_path, check_teacher
from rondel.quant.tuned_or_copied import copies_instead_of_tuning
from rondel.quant.workers import Workers

CONTEXT = 512  # tokens of a window, where the model has as many


@dataclass(frozen=True)
class Outcome:
    """What a trial ended with; `told` has what was measured, for the stage's record."""

    model: Checkpoint  # the single copy, tuned or as it was
    replication: Replication | None  # with fitted parameters and its evaluation
    told: dict[str, Any]
    correction: Mapping[str, LoraFactors] = field(default_factory=dict)  # by tensor name, where it is preferred


def windows_of(source: Checkpoint, text: Sequence[Path], config: ReplicateConfig) -> CalibrationText:
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
        config: ReplicateConfig,
        *,
        workers: Workers,
        device: str = "cpu",
        progress: Progress = silent,
    ) -> None:
        check_teacher(source, teacher)
        self.model, self.text, self.config = source, text, config
        self.workers, self.device, self.progress = workers, device, progress
        self.splits = split(text.windows, text.windows.shape[1])
        self.teacher = Student(teacher, device=device)
        self.student = Student(source, device=device)
        self._remembered = RememberedTeacher(self.teacher)
        self.told: dict[str, Any] = {"losses": {}, "bytes": model_bytes(source), "notes": [], "warnings": []}
        self.base = self._note_losses("input", self.losses())
        self._input = self.model, self.student, self.base
        self.copies: Losses | None = None
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
        found = single_copy.tune(
            self.model,
            self.student,
            self.teacher,
            self.splits,
            self.config,
            workers=self.workers,
            progress=self.progress,
        )
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
        tuning = self.told["tuning"]
        share = tuning["won_back"] = (nll["input"] - nll["tuned"]) / lost
        partly = f", about {tuning['by_text']:.0%} of that by following the text itself" if tuning["by_text"] else ""
        return f"; {share:.1%} of the likelihood that rounding lost is won back{partly}"

    def fit(self, found: Replication) -> Replication:
        """The copies of an explicit plan with parameters fitted to the teacher."""
        self.progress(0, 1, "fitting the copies")
        sets = fit_copies(self.student, self.teacher, self.splits.fit, found, None, self.config, workers=self.workers)
        return with_sets(found, sets)

    def look(self) -> selection.Choice:
        """The automatic choice of copies on the single copy as it is now."""
        config = ChoiceConfig.of(self.config)
        return selection.choose(
            self.student, self.teacher, self.splits, config, workers=self.workers, progress=self.progress
        )

    def choose(self, before: selection.Choice | None = None) -> Replication | None:
        """Copies that surely help, fitted; None, and a note, where there are no such copies.

        `before`: what was chosen before the tuning, which is taken back where that is the better way.
        """
        untuned = self.model is self._input[0]
        found = before if before and untuned else self.look()
        log = [{**entry, "tuned": not untuned} for entry in found.log]
        verdicts = {"against_base": found.verdict, "against_gains": found.control}
        if before and not untuned:
            log = [*({**entry, "tuned": False} for entry in before.log), *log]
            ways = (self._input[1], before), (self.student, found)
            instead = copies_instead_of_tuning(*ways, self._remembered, self.splits, self.config.seed)
            if instead:
                self.model, self.student, self.base = self._input
                found = before
                verdicts = {"against_base": found.verdict, "against_gains": found.control, "against_tuned": instead}
                self.told["tuning"]["kept"] = False
                self.told["notes"].append(
                    "the single copy stays as it came, because copies of it come nearer to the teacher than tuning; "
                    f"against the tuned single copy, {_changed('they', instead)}"
                )
        self.told["log"] = log
        self.told["choice"] = {name: one.told() for name, one in verdicts.items() if one}
        if found.base:
            self.told["choice"]["base"] = found.base
        if found.replication is None:
            fitted = sum(entry["kl"] is not None for entry in log)
            self.told["notes"].append(
                f"no layer is replicated: of {len(log)} candidates, {fitted} of them fitted, none is surely "
                f"better than the model without copies by {DELTA:g} nats a token, and than gains that cost nothing"
            )
        return found.replication

    def judge(self, found: Replication) -> Replication:
        """The copies with their evaluation, against the tuned single copy.

        Raises RegressionError where they surely harm and `config.allow_regression` is not set.
        """
        base = self.base
        copies = self.copies = self._note_losses("copies", self.losses(found))
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

    def compare(self, found: Replication) -> tuple[Replication, list[dict[str, Any]]]:
        """The copies with their rivals in the evaluation, and those rivals that are surely better, as they are told."""
        self.progress(0, 1, "comparing with other uses of the bytes")
        assert self.copies is not None, "they are judged first"
        rows, better = [], []
        for rival in self._rivals().against(found):
            row, verdict = self._measured(rival, self.copies)
            rows.append(row)
            if verdict.high < 0:
                better.append(row)
        evaluation = {f"rival_{row['name'].replace(',', '').replace(' ', '_')}": row["kl"] for row in rows}
        found = replace(found, evaluation={**found.evaluation, **evaluation})
        self.told |= {"evaluation": dict(found.evaluation), "rivals": rows}
        self.told["costs"] = {
            "bytes": stored_bytes(found),
            "read": read_bytes(found, self.model),
            "compute": extra_compute(found, self.model),
        }
        return found, better

    def correct(self, found: Replication | None) -> Mapping[str, LoraFactors]:
        """The low-rank correction in as many bytes as the copies take, or as a copy of every layer would.

        Empty where it is not surely better than no correction.
        """
        self.progress(0, 1, "fitting the low-rank correction")
        budget = stored_bytes(found) if found else copy_of_every_layer(self.model)
        rival = self._rivals().low_rank(budget)
        if rival is None:
            self.told["notes"].append(f"no low-rank correction: {budget} bytes buy no rank of a matrix that helps")
            return {}
        row, verdict = self._measured(rival, self.base)
        self.told["correction"] = row
        self.told["notes"].append(f"the low-rank correction of {rival.bytes} bytes: {_changed('it', verdict)}")
        if not verdict.high < 0:
            return {}
        return {
            name: (left.cpu().numpy(), right.cpu().numpy()) for name, (left, right) in sorted(rival.factors.items())
        }

    def _rivals(self) -> Rivals:
        return Rivals(self.student, self.teacher, self.splits.fit, self.config, self.workers)

    def _measured(self, rival: Rival, other: Losses) -> tuple[dict[str, Any], Verdict]:
        """A rival for the record, with its losses and how they differ from `other`."""
        losses = self.losses(weights=rival.weights)
        verdict = paired(losses.kl, other.kl, self.config.seed)
        row = {
            "name": rival.name,
            "bytes": rival.bytes,
            "read": rival.read,
            **losses.told(),
            "against": verdict.told(),
            "changed": list(rival.changed),
        }
        return row, verdict


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
        choosing = plan is None and config.mode != "none"
        before = trial.look() if choosing and config.tune is not False else None
        if config.tune is not False:
            trial.tune()
        found = trial.fit(plan) if plan else trial.choose(before) if choosing else None
        if found:
            found, better = trial.compare(trial.judge(found))
            trial.told["warnings"] += [_beaten(row, found) for row in better]
            if better and not plan and config.prefer == "none":
                trial.told["notes"].append("no layer is replicated: its bytes have a better use; see --prefer")
                found = None
        correction = trial.correct(found) if config.prefer == "low-rank" else {}
    return Outcome(trial.model, None if correction else found, trial.told, correction)


def _beaten(rival: Mapping[str, Any], found: Replication) -> str:
    """A rival that is surely better than the copies, for people."""
    return (
        f"{rival['name']} is better than the copies: mean KL from the teacher {rival['kl']:.5f} with {rival['bytes']} "
        f"bytes more, {found.evaluation['kl_repl']:.5f} with the copies' {stored_bytes(found)}, "
        f"{found.evaluation['kl_base']:.5f} without either"
    )
