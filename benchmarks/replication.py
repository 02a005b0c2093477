"""Does running a layer again repair what two bits lost? Copies beside other uses of their bytes, on text unseen.

    T             the float model                      L             tuned, and low-rank terms of the copies' bytes
    B0            rounded                              M-bytes       tuned, and larger formats for the bytes of R-serial
    B1            rounded and tuned                                  and of its cache of keys and values
    R             tuned, and the best copy             M-bandwidth   tuned, and larger formats for the bytes that
    R-serial      the best that runs after its layer                 R-serial reads a token
    R-shuffled    R's parameters on another layer      gains         R's branches scaled, and not run again
    FP-R          R's copy on the float model, fitted to the text itself: is it rounding that copies repair?

All are fitted by as many steps, on the same text. R is the copy that screening puts first, whether or not `rondel
replicate` would keep it; the table says so. It is R-serial too where it is serial.

    python benchmarks/replication.py --types Q2_K --steps 150
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the peer, which the tests own

from benchmarks.case import Case, code, digest, kept, rondel  # noqa: E402
from benchmarks.command import SHARED, add_options, cases, publish  # noqa: E402
from rondel.converters.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from rondel.converters.errors import RondelError  # noqa: E402
from rondel.converters.replication import Replication  # noqa: E402
from rondel.quant.alignment import align  # noqa: E402
from rondel.quant.calibration_text import tokenize  # noqa: E402
from rondel.quant.choice_config import ChoiceConfig  # noqa: E402
from rondel.quant.copy_plan import Copy, CopyPlan  # noqa: E402
from rondel.quant.descent import batches, descend  # noqa: E402
from rondel.quant.distill import fit_copies, fitted_leaves, halves, with_sets  # noqa: E402
from rondel.quant.judgement import Losses, RememberedTeacher, Verdict, paired, token_losses  # noqa: E402
from rondel.quant.replicate import ReplicateConfig  # noqa: E402
from rondel.quant.replication_cost import (  # noqa: E402
    extra_compute,
    kv_bytes,
    model_bytes,
    read_bytes,
    stored_bytes,
)
from rondel.quant.replication_trial import Trial, windows_of  # noqa: E402
from rondel.quant.rivals import Rival, Rivals  # noqa: E402
from rondel.quant.screening import Screened, screen  # noqa: E402
from rondel.quant.student import Student, base_path  # noqa: E402
from rondel.quant.workers import Workers  # noqa: E402

TYPES = ("Q2_K", "IQ2_XXS")
STEPS = 40  # of every fit: the whole table in half an hour of two cores, for a small model
TOKENS = 131072  # of the calibration text: half to fit on, a quarter to choose, a quarter to decide
WINDOWS = 66  # of each text, judged: more than 32768 predictions at 512 tokens
PIECE = 8  # windows that one worker judges at once
REMEMBERED = 4 << 30  # bytes of the float model's logits, which every row is compared with
SEED = 0
BATCH = 4  # windows a step, as everywhere


def rounded(case: Case, type_: str, options: argparse.Namespace) -> Path:
    """The quantized model: one that was made before, or rondel's default for the type."""
    if options.quantized and (options.quantized / type_).is_dir():
        return Path(options.quantized / type_)
    folder = options.work / case.model.name
    calibration, out = folder / f"calibration-{case.calibration.stem}", folder / "rondel" / f"{type_}-copies"
    threads, weights = ("--threads", str(options.threads)), digest(*sorted(case.model.glob("*.safetensors")))

    def calibrate() -> dict[str, Any]:
        rondel("calibrate", case.model, "--text", case.calibration, "-o", calibration, *threads, "--force")
        return {}

    def quantize() -> dict[str, Any]:
        rondel("quantize", case.model, "--stats", calibration, "--type", type_, "-o", out, *threads, "--force")
        return {}

    if not (calibration / "manifest.json").is_file():
        calibrate()
    kept(out, digest(weights, case.calibration, code("quant", "converters"), type_), quantize)
    return out


def fit_to_text(student: Student, plan: CopyPlan, windows: torch.Tensor, workers: Workers, steps: int) -> Replication:
    """Copies of a model that is its own teacher, fitted to the text: to the likelihood of its tokens."""
    sets = plan.opening()

    def loss(window: int) -> torch.Tensor:
        tokens = windows[window][None]
        logits = student.logits(tokens[:, :-1], plan.replication, sets).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, tokens[0, 1:].to(logits.device))

    descend(fitted_leaves(sets), loss, batches(len(windows), steps, BATCH, SEED), workers)
    return with_sets(plan.replication, halves(sets))


def on_layer(plan: CopyPlan, layer: int, config: ChoiceConfig, fitted: Replication) -> Replication:
    """The parameters of a fitted copy on the same copy of another layer."""
    other = CopyPlan([replace(copy, layer=layer) for copy in plan.copies], plan.student, config)
    return replace(other.replication, sets=fitted.sets)


class Table:
    """The rows of one type, each judged on every text and compared with an earlier row, token by token."""

    def __init__(self, texts: dict[str, torch.Tensor], teacher: Student, workers: Workers) -> None:
        self.texts, self.teacher, self.workers = texts, RememberedTeacher(teacher, REMEMBERED), workers
        self.rows: list[dict[str, Any]] = []
        self._losses: dict[str, dict[str, Losses]] = {}

    def judge(
        self,
        name: str,
        student: Student,
        against: str | None,
        path: Replication | None = None,
        *,
        weights: Any = None,
        bytes: int = 0,
        read: int = 0,
        compute: float = 0.0,
        note: str = "",
    ) -> None:
        """One row; `bytes`, `read` (a token) and `compute` (a share of the layers') beyond those of the model."""
        own, path = model_bytes(student.source), path or base_path(student.layers)
        row: dict[str, Any] = {"row": name, "bytes": own + bytes, "read": own + read, "compute": 1 + compute}
        row |= {"note": note, "against": against, "texts": {}}
        self._losses[name] = {}
        for text, windows in self.texts.items():
            losses = self._losses[name][text] = self._measure(student, windows, path, weights)
            row["texts"][text] = losses.told()
            if against:
                base = self._losses[against][text]
                changes = {"kl": paired(losses.kl, base.kl, SEED), "nll": paired(losses.nll, base.nll, SEED)}
                row["texts"][text] |= {f"{key}_change": verdict.told() for key, verdict in changes.items()}
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    def _measure(self, student: Student, windows: torch.Tensor, path: Replication, weights: Any) -> Losses:
        def some(piece: torch.Tensor) -> Losses:
            return token_losses(student, self.teacher, piece, path, weights=weights)

        found = list(self.workers.map(some, windows.split(PIECE)))
        return Losses(np.concatenate([one.nll for one in found]), np.concatenate([one.kl for one in found]))

    def rival(self, name: str, student: Student, rival: Rival | None, budget: int) -> None:
        """A row of what so many bytes buy; without numbers where they buy nothing."""
        if rival is None:
            self.rows.append({"row": name, "note": f"{budget} bytes buy nothing that helps", "texts": {}})
            return
        changed = rival.changed[0] if len(rival.changed) == 1 else f"{len(rival.changed)} matrices"
        self.judge(name, student, "B1", weights=rival.weights, bytes=rival.bytes, read=rival.read, note=changed)


def best(found: Sequence[Screened], config: ChoiceConfig, student: Student) -> tuple[CopyPlan, Screened]:
    """What screening puts first, whether or not it would be worth a fit to `replicate`."""
    allowed = [(one, CopyPlan([Copy(one.layer, one.mode, one.parts)], student, config)) for one in found]
    one, plan = max(
        ((one, plan) for one, plan in allowed if not config.failure(plan)), key=lambda pair: pair[0].promise
    )
    return plan, one


def measured(case: Case, texts: Sequence[Path], type_: str, options: argparse.Namespace) -> dict[str, Any]:
    """All rows of one type."""
    source, teacher = open_checkpoint(rounded(case, type_, options)), open_checkpoint(case.model)
    config = ReplicateConfig(steps=options.steps, seed=SEED, tokens=options.tokens)
    seen = windows_of(source, [case.calibration], config)
    context = seen.windows.shape[1]
    judged = {text.name: _windows(source, text, context, options.windows) for text in texts}
    with Workers(options.threads) as workers:
        trial = Trial(source, teacher, seen, config, workers=workers, progress=_progress)
        rows = Table(judged, trial.teacher, workers)
        rows.judge("T", trial.teacher, None)
        rows.judge("B0", trial.input.student, None)
        trial.tune()
        rows.judge("B1", trial.single.student, "B0")
        plan, answer = _copies_and_rivals(trial, rows, context)
    return {
        "type": type_,
        "rows": rows.rows,
        "copy": [str(copy) for copy in plan.copies],
        "replicate": answer,
        "context": context,
        "fitted_on": int(trial.splits.fit.numel()),
        "steps": options.steps,
        "predictions": {text: int(windows.shape[0] * (context - 1)) for text, windows in judged.items()},
    }


def _copies_and_rivals(trial: Trial, rows: Table, context: int) -> tuple[CopyPlan, str]:
    """The rows behind B1: the copy of R, and what `rondel replicate` makes of it."""
    student, workers, choice = trial.single.student, trial.workers, ChoiceConfig.of(trial.config)
    fit = trial.splits.fit
    source = student.source
    aligned = align(student, trial.teacher, fit)
    if aligned is None:
        raise SystemExit(f"{source.root}: its layers do not compare with those of the float model")
    screening = screen(student, aligned, fit, workers)
    plan, screened = best(screening, choice, student)
    serial, _ = best([one for one in screening if one.mode == "serial"], choice, student)

    def fitted(name: str, wanted: CopyPlan) -> tuple[Replication, dict[str, Any]]:
        sets = fit_copies(student, trial.teacher, fit, wanted.replication, wanted.opening(), choice, workers=workers)
        made = with_sets(wanted.replication, sets)
        costs: dict[str, Any] = {"bytes": stored_bytes(made), "read": read_bytes(made, source)}
        costs["compute"] = extra_compute(made, source)
        rows.judge(name, student, "B1", made, **costs, note=", ".join(map(str, wanted.copies)))
        return made, costs

    found, costs = fitted("R", plan)
    again, again_costs = (found, costs) if serial.copies == plan.copies else fitted("R-serial", serial)
    other = (plan.layers[0] + student.layers // 2) % student.layers
    rows.judge("R-shuffled", student, "B1", on_layer(plan, other, choice, found), **costs, note=f"on {other}")
    rivals = Rivals(student, trial.teacher, fit, trial.config, workers)
    gains = rivals.gains(found)
    rows.judge("gains", student, "B1", weights=gains.weights, note="the branches scaled, not run again")
    memory = stored_bytes(again) + kv_bytes(again, source, context)
    rows.rival("L", student, rivals.low_rank(stored_bytes(found)), stored_bytes(found))
    rows.rival("M-bytes", student, rivals.more_bits(memory), memory)
    rows.rival("M-bandwidth", student, rivals.more_bits(again_costs["read"]), again_costs["read"])
    float_plan = CopyPlan(plan.copies, trial.teacher, choice)
    to_text = fit_to_text(trial.teacher, float_plan, fit, workers, trial.config.steps)
    rows.judge("FP-R", trial.teacher, "T", to_text, **costs)
    return plan, _answer(trial, screened, found, gains.weights)


def _answer(trial: Trial, screened: Screened, found: Replication, gains: Any) -> str:
    """What `rondel replicate` makes of the copy: the reason against it, or that it is kept."""
    why = screened.failure()
    if why:
        return f"none: it {why}"
    student, base = trial.single.student, trial.single.losses
    copies, scaled = trial.losses(student, found), trial.losses(student, weights=gains)
    verdicts: list[Verdict] = [paired(copies.kl, one.kl, SEED) for one in (base, scaled)]
    kept = verdicts[0].better() and verdicts[1].better(0)
    return "kept" if kept else "none: text that chose nothing does not confirm it"


def _windows(source: Checkpoint, text: Path, context: int, count: int) -> torch.Tensor:
    return tokenize(source, [text], tokens=count * context, context=context, seed=None).windows


def _progress(done: int, total: int, what: str) -> None:
    if total > 1 and done % 10 == 0:
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)


def table(told: dict[str, Any]) -> str:
    """One type of one model in Markdown: a line for each row, two columns for each text."""
    texts = list(told["predictions"])
    counts = " and ".join(f"{count} predictions of {text}" for text, count in told["predictions"].items())
    lines = [
        f"{told['model']} at {told['type']}, every fit {told['steps']} steps on {told['fitted_on']} tokens, judged on "
        f"{counts}. R is the copy that screening puts first, {', '.join(told['copy'])}; `rondel replicate` answers "
        f"{told['replicate']}. Changes, in thousandths of a nat, are against B1, of B1 against B0 and of FP-R "
        "against T, with the ends of a 90 % interval:",
        "",
        "| | | bytes | read a token | compute |" + "".join(f" {text}: NLL | KL |" for text in texts),
        "|---|---|--:|--:|--:|" + "--:|--:|" * len(texts),
    ]
    for row in told["rows"]:
        if not row["texts"]:
            lines.append(f"| {row['row']} | {row['note']} |" + " |" * (3 + 2 * len(texts)))
            continue
        cells = [row["row"], row["note"], str(row["bytes"]), str(row["read"]), f"{row['compute']:.3f}"]
        for text in texts:
            losses = row["texts"][text]
            cells += [_cell(losses[key], losses.get(f"{key}_change")) for key in ("nll", "kl")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: float, change: dict[str, Any] | None) -> str:
    if not change:
        return f"{value:.4f}"
    mean, low, high = (1000 * change[key] for key in ("mean", "low", "high"))
    return f"{value:.4f}, {mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--types", default=",".join(TYPES), help="of the quantized models, by commas")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of every fit; default {STEPS}")
    parser.add_argument("--quantized", type=Path, help="a folder of quantized models by type, made before")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"half of them to fit on; default {TOKENS}")
    add_options(parser)
    parser.set_defaults(windows=WINDOWS)
    return parser.parse_args()


def main() -> None:
    """Run what the options ask for."""
    options = _options()
    prose = SHARED / "models/prose-7m"
    asked = cases(options, [prose if prose.is_dir() else ROOT / "tests/models/stories-4m"])
    told = []
    for model in dict.fromkeys(case.model for case in asked):
        of_model = [case for case in asked if case.model == model]
        texts = [case.evaluation for case in of_model]
        for type_ in options.types.split(","):
            try:
                told.append({"model": model.name, **measured(of_model[0], texts, type_, options)})
            except RondelError as error:
                raise SystemExit(str(error)) from error
    publish(options, "replication", told, table)


if __name__ == "__main__":
    main()
