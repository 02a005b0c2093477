"""Owns the choice whether to rotate: what rounding loses as the model is, rescaled, rotated, and both.

The measure is output_error.py's, with the formats and the error feedback that quantize will use, on the first, the
middle and the last layer, the embedding and the head; second moments follow the rotation exactly. What is written into
the residual stream counts by what reads it there: a channel that few gains and columns amplify may be rounded coarsely.
Rows meet in that measure as they are, so it is fair between a basis where channels differ a lot and one where they are
alike. A head that needs a matrix of its own is paid for: the bytes would buy the unrotated model more bits a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import EMBEDDING, OUTPUT_NORM, block_tensor
from rondel.converters.progress import Progress, silent
from rondel.converters.rotation import Rotation
from rondel.converters.stats import OUTPUT_IN, Stats, site_tensor
from rondel.native.formats import decode, format_bytes
from rondel.quant import awq
from rondel.quant.automatic import NEARLY, sampled_layers
from rondel.quant.mixtures import Choice, mixture_named
from rondel.quant.output_error import digits, energies, sampled
from rondel.quant.quantize_task import QuantizeConfig, Task, choices_for, prepare
from rondel.quant.rescaled_view import Place
from rondel.quant.rotate_config import RotateConfig, resolved_target
from rondel.quant.rotated_stats import MovedStats
from rondel.quant.rotated_view import RotatedView
from rondel.quant.rounding import round_matrix
from rondel.quant.trial import ROWS_MEASURED, Rounding, Trial
from rondel.quant.workers import Workers

AS_IS, SCALE, ROTATE, BOTH = "as_is", "scale", "rotate", "rotate_and_scale"
WAYS = (AS_IS, SCALE, ROTATE, BOTH)
TURNED = (ROTATE, BOTH)
MARGIN = 0.25  # dB: about what the measure and the divergence from the float model disagree by between bases
BIT = 20 * math.log10(2)  # dB: halving every step of a grid takes one more bit a weight


@dataclass
class _Basis:
    """The model in one basis: its weights, its second moments, and how its matrices will be rounded."""

    model: Checkpoint
    moment: Callable[[Place], torch.Tensor | None]
    choices: Mapping[str, Choice]
    rounding: Rounding
    plain: dict[str, list[float]] = field(default_factory=dict)  # errors by class of tensors
    scaled: dict[str, list[float]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all matrices."""
        shapes = {name: self.model.info(name).shape for name in self.choices}
        return sum(format_bytes(self.choices[name].format, *shape) for name, shape in shapes.items())

    def add(self, kind: str, plain: float, scaled: float) -> None:
        """Take in the error of one matrix."""
        self.plain.setdefault(kind, []).append(plain)
        self.scaled.setdefault(kind, []).append(scaled)


def check_choice(source: Checkpoint, config: RotateConfig, stats: Stats | None) -> None:
    """Refuse a choice that could not be measured."""
    if config.rotate == "auto" and stats is not None:
        _task(source, config, stats)


def _task(source: Checkpoint, config: RotateConfig, stats: Stats) -> Task:
    target = resolved_target(source, config)
    return prepare(source, QuantizeConfig(type=config.type, target=target), stats)


def _bases(
    source: Checkpoint, config: RotateConfig, stats: Stats, rotations: list[Rotation], workers: Workers
) -> tuple[Task, _Basis, _Basis]:
    task = _task(source, config, stats)
    now = _Basis(source, lambda place: stats.second_moment(*place), task.choices, task.rounding())
    view = RotatedView(source, config, stats, rotations)
    moved = MovedStats(source, stats, rotations, workers)
    choices = choices_for(view, task.policy, statistics=True)
    formats = {name: choice.format for name, choice in choices.items()}
    rounding = replace(now.rounding, formats=formats)
    turned = _Basis(view, lambda place: moved.site(*place).get(site_tensor(*place, "second_moment")), choices, rounding)
    return task, now, turned


def _stream_counts(basis: _Basis, layers: list[int], *, head: bool) -> torch.Tensor:
    """How much an error in each channel of the residual stream matters (width,), with the mean one.

    Its share in the outputs of the linears behind the norms, each relative to what the linear puts out. The sum over
    all channels is the same in every basis.
    """
    model, total = basis.model, torch.zeros(basis.model.numbers.width, dtype=torch.float64)

    def add(place: Place, gain: str, matrices: list[str]) -> None:
        moment = basis.moment(place)
        if moment is None:
            return
        for name in matrices:
            weights = sampled(model.read(name), ROWS_MEASURED)
            power = float(energies(weights, moment).sum())
            squares = (weights.to(torch.float64) * model.read_float(gain, torch.float64)).square().sum(0)
            total.add_(squares / power if power > 0 else 0)

    for layer in layers:
        for norm in model.family.norms:
            if norm.reads == "residual" and norm.makes:
                readers = [block_tensor(layer, linear.role) for linear in model.family.readers(norm.makes)]
                add((layer, norm.makes), block_tensor(layer, norm.role), readers)
    if head:
        add((None, OUTPUT_IN), OUTPUT_NORM, [model.head()])
    mean = total.mean()
    return total / mean if mean > 0 else torch.ones_like(total)


def _measure_place(basis: _Basis, place: Place, rounding: Rounding, stream: torch.Tensor, workers: Workers) -> None:
    layer, site = place
    moment = basis.moment(place)
    if moment is None:
        return
    trial = Trial(basis.model, place, moment)
    readers = () if layer is None else basis.model.family.readers(site)
    kinds = [linear.role for linear in readers] or ["output"]
    counts = {block_tensor(layer or 0, linear.role): stream for linear in readers if linear.writes == "residual"}
    plain = scaled = trial.errors(rounding, None, workers, counts)
    # Only scales inside the blocks: quantize leaves the head's norm alone.
    if trial.rescalable and layer is not None:
        alpha, _ = awq.search(trial, rounding, workers)
        if alpha:
            scaled = trial.errors(rounding, awq.scale_of(trial.shared, alpha), workers, counts)
    for kind, *errors in zip(kinds, plain, scaled, strict=True):
        basis.add(kind, *errors)


def _embedding_error(basis: _Basis, format: str, stream: torch.Tensor, workers: Workers) -> float:
    """The embedding is looked up, so its channels are rounded as if they counted alike, and matter as `stream`."""
    rows = sampled(basis.model.read(EMBEDDING), ROWS_MEASURED)
    packed = round_matrix(EMBEDDING, rows, format, None, workers.threads).packed
    lost = (torch.from_numpy(decode(format, packed, *rows.shape)) - rows).to(torch.float64).square()
    whole = float(rows.to(torch.float64).square().sum())
    return float((lost @ stream).sum()) / whole if whole > 0 else 0.0


def _measure(basis: _Basis, layers: list[int], workers: Workers, tell: Callable[[], None]) -> torch.Tensor:
    """Fill in the errors of a basis; returns how much each channel of its stream matters."""
    ends = not any(rotation.site == "boundary" for rotation in basis.model.rotations)
    inside = _stream_counts(basis, layers, head=ends)
    for layer in layers:
        for site in basis.model.family.sites:
            _measure_place(basis, (layer, site), basis.rounding, inside, workers)
        tell()
    _measure_place(basis, (None, OUTPUT_IN), basis.rounding, inside, workers)
    if ends:
        error = _embedding_error(basis, basis.choices[EMBEDDING].format, inside, workers)
        basis.add("token_embd", error, error)
    tell()
    return inside


def _with_fine_embedding(now: _Basis, turned: _Basis, stream: torch.Tensor, workers: Workers) -> _Basis:
    """The turned model with the format that the embedding has while it is the head: mixtures give it less alone."""
    choice = now.choices[EMBEDDING]
    error = {"token_embd": [_embedding_error(turned, choice.format, stream, workers)]}
    choices = {**turned.choices, EMBEDDING: choice}
    return replace(turned, choices=choices, plain=turned.plain | error, scaled=turned.scaled | error)


def _compared(now: _Basis, turned: _Basis, share: float) -> dict[str, Any]:
    """The table, and the decibels of every way with those that its bytes would be worth; as `choose` tells them."""
    weights = sum(math.prod(now.model.info(name).shape) for name in now.choices)
    extra = BIT * 8 * (turned.bytes - now.bytes) / weights
    lines, gains = _table(now, turned, share)
    return {
        "bytes": {"now": now.bytes, "rotated": turned.bytes},
        "decibels_for_bytes": round(extra, 3),
        "decibels": {way: round(gain + extra * (way in TURNED), 3) for way, gain in gains.items()},
        "tensors": lines,
    }


def choose(
    source: Checkpoint,
    config: RotateConfig,
    stats: Stats | None,
    rotations: list[Rotation] | None,
    *,
    workers: Workers,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What to do with the model that shall become one of `config.type`, and why; `check_choice` has been called.

    "chosen" is one of WAYS; quantize follows "method", and "embedding_type" where that pays for its
    bytes. A line a class of tensors has the mean relative output error as the model is, and the decibels by which each
    way changes it; the last one is of all matrices.
    Without statistics nothing is measured, and it turns as asked.
    """
    if stats is None or rotations is None:
        return {
            "type": mixture_named(config.type),
            "chosen": ROTATE,
            "reason": "without statistics nothing is measured",
        }
    task, now, turned = _bases(source, config, stats, rotations, workers)
    layers, done = sampled_layers(source.numbers.layers), 0
    steps = 2 * (len(layers) + 1)

    def tell() -> None:
        nonlocal done
        progress(done, steps, "rotated or not")
        done += 1

    _measure(now, layers, workers, tell)
    stream = _measure(turned, layers, workers, tell)
    if "token_embd" not in turned.plain:  # it keeps its basis, and its codes
        turned.add("token_embd", *(errors["token_embd"][0] for errors in (now.plain, now.scaled)))
    share = len(layers) / source.numbers.layers
    compared, fine = _compared(now, turned, share), {}
    if turned.choices[EMBEDDING] != now.choices[EMBEDDING]:
        other = _compared(now, _with_fine_embedding(now, turned, stream, workers), share)
        if min(other["decibels"][way] for way in TURNED) < min(compared["decibels"][way] for way in TURNED):
            compared, fine = other, {"embedding_type": now.choices[EMBEDDING].format}
    chosen, reason = decide(compared["decibels"])
    method = task.method.name if chosen in (AS_IS, ROTATE) else f"awq+{task.method.name}"
    told = {"type": task.config.type, "chosen": chosen, "reason": reason, "method": method, "layers": layers}
    return told | (fine if chosen in TURNED else {}) | compared


def decide(decibels: Mapping[str, float]) -> tuple[str, str]:
    """The way to take, and why; `decibels` of each way over the model as it is, negative where less is lost."""
    enough = 10 * math.log10(1 + NEARLY)  # scales must pay too
    kept = SCALE if decibels[SCALE] < decibels[AS_IS] - enough else AS_IS
    turned = BOTH if decibels[BOTH] < decibels[ROTATE] - enough else ROTATE
    gain = decibels[kept] - decibels[turned]
    if gain > MARGIN:
        return turned, f"rotating gains {gain:.2f} dB"
    if gain > 0:
        return kept, f"rotating gains {gain:.2f} dB, less than the {MARGIN} dB that the measure can tell apart"
    return kept, f"rotating costs {-gain:.2f} dB"


def _table(now: _Basis, turned: _Basis, share: float) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A line for each class of tensors, and the decibels of all; layers stand for 1 / `share` layers each."""
    ways = {AS_IS: now.plain, SCALE: now.scaled, ROTATE: turned.plain, BOTH: turned.scaled}
    lines, totals = [], dict.fromkeys(WAYS, 0.0)
    for kind, measured in now.plain.items():
        errors = {way: fmean(found[kind]) for way, found in ways.items()}
        count = len(measured) / (1 if kind in ("token_embd", "output") else share)
        for way, error in errors.items():
            totals[way] += count * error
        lines.append({"tensors": kind, "formats": _formats(now, turned, kind), **_line(errors)})
    lines.append({"tensors": "all", "formats": "", **_line(totals)})
    return lines, {way: _decibels(total, totals[AS_IS]) for way, total in totals.items()}


def _line(errors: Mapping[str, float]) -> dict[str, float]:
    return {"error": digits(errors[AS_IS])} | {  # + 0.0: no "-0"
        way: round(_decibels(errors[way], errors[AS_IS]), 2) + 0.0 for way in WAYS if way != AS_IS
    }


def _decibels(error: float, reference: float) -> float:
    return 10 * math.log10(error / reference) if error > 0 and reference > 0 else 0.0


def _formats(now: _Basis, turned: _Basis, kind: str) -> str:
    """The formats of a class: "Q2_K", "Q2_K, Q4_K", and where the head is untied "Q6_K to Q2_K"."""

    def of(basis: _Basis) -> str:
        head = EMBEDDING if kind == "token_embd" else basis.model.head()
        outside = kind in ("token_embd", "output")
        names = [head] if outside else [name for name in basis.choices if f".{kind}." in name]
        return ", ".join(dict.fromkeys(basis.choices[name].format for name in names))

    before, behind = of(now), of(turned)
    return before if before == behind else f"{before} to {behind}"
