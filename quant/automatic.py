"""Owns the method auto: the named methods are tried on some layers, and the one whose outputs lose least is taken.

The first, the middle and the last layer stand for all: what distinguishes layers, large activations above all, is
found there. Among methods whose errors are nearly the same the simplest is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.progress import Progress, silent
from rondel.converters.stats import Stats
from rondel.quant import awq, smoothquant
from rondel.quant.importance import Importance
from rondel.quant.methods import RESCALINGS, ROUNDINGS, Method
from rondel.quant.output_error import digits
from rondel.quant.trial import Rounding, Trial, trial_at
from rondel.quant.workers import Workers

NEARLY = 0.01  # of the least error: what a simpler method may lose on top
WITHOUT_STATISTICS = "imatrix"


def sampled_layers(layers: int) -> list[int]:
    """The first, the middle and the last layer."""
    return sorted({0, layers // 2, layers - 1})


def candidates(source: Checkpoint, importance: Importance, *, feedback: bool) -> list[Method]:
    """The methods that the statistics allow, the simplest first; `feedback`: whether gptq is one of them."""
    roundings = [rounding for rounding in ROUNDINGS if feedback or not Method(rounding).feeds_back]
    methods = [Method(rounding) for rounding in roundings]
    for rescaling in RESCALINGS:
        if rescaling == "smoothquant" and not _has_ranges(source, importance.stats):
            continue
        methods += [Method(rounding, rescaling) for rounding in roundings if rounding != "rtn"]
    return methods


def _has_ranges(source: Checkpoint, stats: Stats | None) -> bool:
    try:
        smoothquant.check(source, stats)
    except RondelError:
        return False
    return True


def decide(errors: Mapping[str, float]) -> str:
    """The first method whose error is nearly the least one; `errors` names simpler methods first."""
    least = min(errors.values())
    return next(name for name, error in errors.items() if error <= (1 + NEARLY) * least)


def _scale(
    trial: Trial, method: Method, rounding: Rounding, smooth: torch.Tensor | None, workers: Workers
) -> torch.Tensor | None:
    """The scales (d,) that a method folds in at the trial's place, or None for none; `smooth` are smoothquant's."""
    if method.rescaling == "smoothquant":
        return smooth
    if method.rescaling is None or not trial.rescalable:
        return None
    return awq.scale_of(trial.shared, awq.search(trial, rounding, workers)[0])


def choose(
    source: Checkpoint,
    importance: Importance | None,
    roundings: Mapping[Method, Rounding],
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The name of the method to take, and why: the layers, the mean output error by method, and the reason."""
    if importance is None:
        return {"chosen": WITHOUT_STATISTICS, "reason": "there are no statistics"}
    layers, found = sampled_layers(source.numbers.layers), dict[str, list[float]]()
    with Workers(threads) as workers:
        for done, layer in enumerate(layers):
            progress(done, len(layers), f"methods on layer {layer}")
            for site in source.family.sites:
                trial = trial_at(source, (layer, site), importance)
                if trial is None:
                    continue
                stats, smoothed = importance.stats, any(method.rescaling == "smoothquant" for method in roundings)
                smooth = smoothquant.scale_at(source, stats, (layer, site)) if smoothed and stats else None
                for method, rounding in roundings.items():
                    scale = _scale(trial, method, rounding, smooth, workers)
                    found.setdefault(method.name, []).extend(trial.errors(rounding, scale, workers))
    if not found:
        reason = "the statistics hold nothing of the layers tried"
        return {"chosen": WITHOUT_STATISTICS, "layers": layers, "reason": reason}
    errors = {name: digits(fmean(values)) for name, values in found.items()}
    chosen = decide(errors)
    least = min(errors, key=lambda name: errors[name])
    reason = (
        "the least output error" if chosen == least else f"simpler than {least}, with nearly as small an output error"
    )
    return {"chosen": chosen, "layers": layers, "errors": errors, "reason": reason}
