"""Owns the steps from a quantized model, its teacher and text to a result: tune, choose or fit, judge, compare.

The text is cut in three: one piece fits, one chooses, and one that did neither tells what came of it, token by token
against the same model without copies. All is measured against the tuned single copy, and beside what other uses of the
same bytes gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RegressionError
from rondel.converters.lora import Factors
from rondel.converters.progress import Progress, silent
from rondel.converters.replication import Replication
from rondel.quant.calibration_text import CalibrationText, tokenize
from rondel.quant.choice_config import ChoiceConfig
from rondel.quant.distill import fit_copies, with_sets
from rondel.quant.judgement import DELTA, Losses, RememberedTeacher, Verdict, paired, split, token_losses
from rondel.quant.replaced_view import ReplacedView
from rondel.quant.replicate_config import ReplicateConfig
from rondel.quant.replication_cost import copy_of_every_layer, extra_compute, model_bytes, read_bytes, stored_bytes
from rondel.quant.rivals import Rival, Rivals
from rondel.quant.selection import Choice, choose
from rondel.quant.single_copy import tune
from rondel.quant.student import Student, Weights, base_path, check_teacher
from rondel.quant.tuned_together import Together, nearer_together
from rondel.quant.workers import Workers

CONTEXT = 512  # tokens of a window, where the model has as many


@dataclass(frozen=True)
class Way:
    """A model that a trial may end with, its forward pass, and its losses without copies on the text that judges."""

    model: Checkpoint
    student: Student
    losses: Losses


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
        self.text, self.config = text, config
        self.workers, self.device, self.progress = workers, device, progress
        self.splits = split(text.windows, text.windows.shape[1])
        self.teacher = Student(teacher, device=device)
        self._remembered = RememberedTeacher(self.teacher)
        self.told: dict[str, Any] = {"losses": {}, "bytes": model_bytes(source), "notes": [], "warnings": []}
        self.input = self._way("input", source, Student(source, device=device))
        self.single = self.taken = self.input  # the best model without copies, and the one that copies run on
        self.copies: Losses | None = None
        self._note_losses("teacher", token_losses(self.teacher, self._remembered, self.splits.confirm))

    def losses(self, student: Student, found: Replication | None = None, weights: Weights | None = None) -> Losses:
        """On the text that judges: of the base path, or with copies, or with other weights."""
        path = found or base_path(student.layers)
        return token_losses(student, self._remembered, self.splits.confirm, path, weights=weights)

    def _note_losses(self, name: str, found: Losses) -> Losses:
        self.told["losses"][name] = found.told()
        return found

    def _way(self, name: str, model: Checkpoint, student: Student) -> Way:
        return Way(model, student, self._note_losses(name, self.losses(student)))

    def tune(self) -> None:
        """Put the tuned single copy in the place of the model, unless it is worse on the text that judges."""
        found = tune(
            self.input.model,
            self.input.student,
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
        model = ReplacedView(self.input.model, found.data)
        tuned = self._way("tuned", model, Student(model, device=self.device))
        verdict = paired(tuned.losses.kl, self.input.losses.kl, self.config.seed)
        self.told["tuning"] |= {"tensors": len(found.data), "kl": verdict.told()}
        if verdict.low > 0:
            self.told["tuning"]["kept"] = False
            self.told["notes"].append(f"the single copy stays as it is: {_changed('tuning it', verdict)}")
            return
        self.single = self.taken = tuned
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

    def fit(self, plan: Replication, before: Replication | None = None) -> Replication:
        """The copies of an explicit plan with parameters fitted to the teacher.

        `before`: the same, fitted before the tuning; as of `choose`, where they help the model as it came.
        """
        self.progress(0, 1, "fitting the copies")
        student, fit = self.single.student, self.splits.fit
        sets = fit_copies(
            student, self.teacher, fit, plan, None, self.config, workers=self.workers, progress=self.progress
        )
        found = with_sets(plan, sets)
        if before is None or self.single is self.input:
            return found
        student = self.input.student
        without, copies = (
            token_losses(student, self._remembered, self.splits.select, path).told()["kl"]
            for path in (base_path(student.layers), before)
        )
        together = self._together(before, found) if copies < without - DELTA else None
        if together is None:
            return found
        self.told["choice"] = {"against_tuned": together.verdict.told()}
        return together.copies

    def look(self) -> Choice:
        """The automatic choice of copies on the single copy as it is now."""
        config = ChoiceConfig.of(self.config)
        return choose(
            self.single.student, self.teacher, self.splits, config, workers=self.workers, progress=self.progress
        )

    def choose(self, before: Choice | None = None) -> Replication | None:
        """Copies that surely help, fitted; None, and a note, where there are no such copies.

        `before`: what was chosen before the tuning; it is tuned together with the model where that is the better way.
        """
        tuned = self.single is not self.input
        found = self.look() if tuned or not before else before
        looks = [(False, before), (True, found)] if before and tuned else [(tuned, found)]
        together = None
        if before and before.replication and tuned:
            together = self._together(before.replication, found.replication)
        if before and together:
            found = before
        verdicts = {"against_base": found.verdict, "against_gains": found.control}
        if together:
            verdicts["against_tuned"] = together.verdict
        log = self.told["log"] = [{**entry, "tuned": kind} for kind, look in looks for entry in look.log]
        bases = [{**look.base, "tuned": kind} for kind, look in looks if look.base]
        self.told["choice"] = {"bases": bases} | {name: one.told() for name, one in verdicts.items() if one}
        chosen = together.copies if together else found.replication
        if chosen is None:
            fitted = sum(entry["kl"] is not None for entry in log)
            model = "tuned model" if tuned else "model"
            self.told["notes"].append(
                f"no layer is replicated: of {len(log)} candidates, {fitted} of them fitted, none is surely better "
                f"than the {model} without copies by {DELTA:g} nats a token, and than gains that cost nothing"
            )
        return chosen

    def _together(self, before: Replication, late: Replication | None) -> Together | None:
        """Take the model as it came, tuned with the copies `before` in place, if that is the better way."""
        found = nearer_together(
            self.input.model,
            self.input.student,
            before,
            (self.single.student, late),
            self.teacher,
            self.splits,
            self.config,
            workers=self.workers,
            progress=self.progress,
        )
        if found:
            model = ReplacedView(self.input.model, found.tuned.data)
            self.taken = self._way("base", model, Student(model, device=self.device))
            self.told["together"] = dict(found.tuned.report)
            alone, base = (self.told["losses"][name]["kl"] for name in ("tuned", "base"))
            self.told["notes"].append(
                "copies are tuned together with the model as it came, because against the tuned single copy "
                f"{_changed('they', found.verdict)}; a program that runs every layer once has KL {base:.5f} with this "
                f"model, and {alone:.5f} with the single copy that --mode none writes"
            )
        return found

    def judge(self, found: Replication) -> Replication:
        """The copies with their evaluation, against the tuned single copy.

        Raises RegressionError where they surely harm and `config.allow_regression` is not set.
        """
        base = self.taken.losses
        copies = self.copies = self._note_losses("copies", self.losses(self.taken.student, found))
        divergence = paired(copies.kl, base.kl, self.config.seed)
        worse = divergence.low > 0
        if worse and not self.config.allow_regression:
            raise RegressionError(
                f"{self.taken.model.root}: the fitted copies make the model worse: mean KL from the teacher "
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
        assert self.copies is not None, "they are judged first"
        rows, better = list[dict[str, Any]](), list[dict[str, Any]]()
        rivals = self._rivals().against(found)
        for done, (name, make) in enumerate(rivals.items()):
            self.progress(done, len(rivals), f"comparing with other uses of the bytes: {name}")
            rival = make()
            if rival is None:
                continue
            row, verdict = self._measured(rival, self.copies)
            rows.append(row)
            if verdict.high < 0:
                better.append(row)
        evaluation = {f"rival_{row['name'].replace(',', '').replace(' ', '_')}": row["kl"] for row in rows}
        found = replace(found, evaluation={**found.evaluation, **evaluation})
        self.told |= {"evaluation": dict(found.evaluation), "rivals": rows}
        self.told["costs"] = {
            "bytes": stored_bytes(found),
            "read": read_bytes(found, self.taken.model),
            "compute": extra_compute(found, self.taken.model),
        }
        return found, better

    def correct(self, found: Replication | None) -> Mapping[str, Factors]:
        """The low-rank correction in as many bytes as the copies take, or as a copy of every layer would.

        Empty where it is not surely better than no correction.
        """
        self.progress(0, 1, "fitting the low-rank correction")
        budget = stored_bytes(found) if found else copy_of_every_layer(self.single.model)
        rival = self._rivals().low_rank(budget)
        if rival is None:
            self.told["notes"].append(f"no low-rank correction: {budget} bytes buy no rank of a matrix that helps")
            return {}
        row, verdict = self._measured(rival, self.single.losses)
        self.told["correction"] = row
        self.told["notes"].append(f"the low-rank correction of {rival.bytes} bytes: {_changed('it', verdict)}")
        if not verdict.high < 0:
            return {}
        return {
            name: (left.cpu().numpy(), right.cpu().numpy()) for name, (left, right) in sorted(rival.factors.items())
        }

    def _rivals(self) -> Rivals:
        return Rivals(self.single.student, self.teacher, self.splits.fit, self.config, self.workers)

    def _measured(self, rival: Rival, other: Losses) -> tuple[dict[str, Any], Verdict]:
        """A rival for the record: its losses in the place of the single copy, and how they differ from `other`."""
        losses = self.losses(self.single.student, weights=rival.weights)
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
