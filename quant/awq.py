"""Owns AWQ (Lin et al. 2023, arXiv 2306.00978): channels that carry much are scaled up before rounding.

The scale of a channel is the root mean square of its activations to the power alpha. Alpha is searched for each group
of linears that read one site, by the error of their outputs with the encoder and the statistics that rounding will
use; zero is among the candidates, so no group comes out worse than unscaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.progress import Progress, silent
from rondel.quant.importance import Importance
from rondel.quant.output_error import digits
from rondel.quant.rescaled_view import Place, Rescaling, normalized, place_name, rescalable
from rondel.quant.trial import Rounding, Trial, trial_at
from rondel.quant.workers import Workers

ALPHAS = tuple(step / 10 for step in range(11))
PATIENCE = 3  # alphas in a row that are no better
LEAST = 1e-4  # of the mean root mean square: what a channel that is never active counts


def scale_of(means: torch.Tensor, alpha: float) -> torch.Tensor:
    """means^(alpha / 2) of mean squares (d,), with the geometric mean 1."""
    root = means.to(torch.float64).sqrt()
    if not bool(root.any()):
        return torch.ones(len(root))
    return normalized(root.clamp(min=LEAST * float(root.mean())) ** alpha)


def search(
    trial: Trial, rounding: Rounding, workers: Workers, alphas: Sequence[float] = ALPHAS
) -> tuple[float, dict[float, float]]:
    """The alpha of the least mean error, and the errors of those that were tried, in rising order from 0 on.

    The error has one valley: the search ends when PATIENCE alphas in a row were no better than the best.
    """
    errors: dict[float, float] = {}
    for alpha in alphas:
        errors[alpha] = fmean(trial.errors(rounding, scale_of(trial.shared, alpha), workers))
        best = min(errors, key=lambda tried: (errors[tried], tried))
        if len([tried for tried in errors if tried > best]) >= PATIENCE:
            break
    return best, errors


def choose(
    source: Checkpoint,
    importance: Importance,
    rounding: Rounding,
    *,
    alpha: float | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Rescaling:
    """The scales of every place of a block that was measured; with `alpha` the search is left out.

    Each group tells its alpha and its output error without scales and with them.
    """
    scales: dict[Place, torch.Tensor] = {}
    groups: dict[str, dict[str, Any]] = {}
    with Workers(threads) as workers:
        for layer in range(source.numbers.layers):
            progress(layer, source.numbers.layers, f"scales of layer {layer}")
            for place in rescalable(source, layer):
                trial = trial_at(source, place, importance)
                if trial is None:
                    continue
                best, errors = search(trial, rounding, workers, ALPHAS if alpha is None else (0.0, alpha))
                best = best if alpha is None else alpha
                scales[place] = scale_of(trial.shared, best)
                told = {"alpha": best, "unscaled": digits(errors[0.0]), "error": digits(errors[best])}
                groups[place_name(place)] = told
    return Rescaling(scales, groups)
