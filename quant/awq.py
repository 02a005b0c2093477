"""Owns AWQ (Lin et al. 2023, arXiv 2306.00978): channels that carry much are scaled up before rounding.

The scale of a channel is the root mean square of its activations to the power alpha. Alpha is searched for each group
of linears that read one site, by the error of their outputs with the encoder and the statistics that rounding will
use; zero is among the candidates, so no group comes out worse than unscaled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import block_tensor
from rondel.converters.progress import Progress, silent
from rondel.native.formats import decode
from rondel.quant.importance import Importance
from rondel.quant.output_error import digits, moment_of, relative_error, sampled
from rondel.quant.rescaled_view import (
    Place,
    Rescaling,
    by_query_head,
    normalized,
    over_query_heads,
    place_name,
    rescalable,
)
from rondel.quant.rounding import Encoder
from rondel.quant.workers import Workers

ALPHAS = tuple(step / 10 for step in range(11))
ROWS_MEASURED = 512  # of a matrix, evenly spread: the choice of one number needs no more
LEAST = 1e-4  # of the mean root mean square: what a channel that is never active counts

# The encoder of a matrix, made for all the rows that will be given to it in pieces; None for means: all columns alike.
EncoderOf = Callable[[torch.Tensor], Encoder]


def scale_of(means: torch.Tensor, alpha: float) -> torch.Tensor:
    """means^(alpha / 2) of mean squares (d,), with the geometric mean 1."""
    root = means.to(torch.float64).sqrt()
    if not bool(root.any()):
        return torch.ones(len(root))
    return normalized(root.clamp(min=LEAST * float(root.mean())) ** alpha)


def shared_means(source: Checkpoint, site: str, means: torch.Tensor) -> torch.Tensor:
    """The mean squares (d,) that a site's scales follow: query heads that share their values share their scales."""
    if site != "heads":
        return means
    return over_query_heads(by_query_head(means, source.numbers).mean(0), source.numbers)


@dataclass(frozen=True)
class Rounding:
    """How the matrices will be rounded: the format of each, what encodes them, and whether by statistics."""

    formats: Mapping[str, str]
    encoder_of: EncoderOf
    weighted: bool


class _Group:
    """The linears of a block that read one place: their weights, their formats, and what they read."""

    def __init__(self, source: Checkpoint, place: Place, rounding: Rounding, moment: torch.Tensor) -> None:
        layer, site = place
        assert layer is not None
        names = [block_tensor(layer, linear.role) for linear in source.family.readers(site)]
        self.rounding = rounding
        self.formats = [rounding.formats[name] for name in names]
        self.weights = [sampled(source.read(name), ROWS_MEASURED) for name in names]
        self.moment = moment
        self.means = moment.diagonal() if moment.dim() == 2 else moment
        self.shared = shared_means(source, site, self.means)

    def error(self, alpha: float, workers: Workers) -> float:
        """The mean of the linears' relative output errors with the scales of that alpha."""
        scale = scale_of(self.shared, alpha)
        means = (self.means / scale.square()).numpy() if self.rounding.weighted else None
        total = 0.0
        for weights, format in zip(self.weights, self.formats, strict=True):
            scaled = weights * scale
            encoder = self.rounding.encoder_of(scaled)

            def rounded(
                rows: slice, scaled: torch.Tensor = scaled, encoder: Encoder = encoder, format: str = format
            ) -> torch.Tensor:
                values = scaled[rows].numpy()
                return torch.from_numpy(decode(format, encoder(format, values, means), *values.shape)) / scale

            total += relative_error(weights, rounded, self.moment, workers)
        return total / len(self.weights)

    def best(self, alphas: Sequence[float], workers: Workers) -> tuple[float, dict[float, float]]:
        """The alpha of the least error, the smallest of equals, and all errors."""
        errors = {alpha: self.error(alpha, workers) for alpha in alphas}
        return min(errors, key=lambda alpha: (errors[alpha], alpha)), errors


def choose(
    source: Checkpoint,
    importance: Importance,
    rounding: Rounding,
    *,
    alpha: float | None = None,
    layers: Sequence[int] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Rescaling:
    """The scales of every place of a block that was measured; with `alpha` the search is left out.

    The record holds, per place, alpha and the output error without scales and with them.
    """
    scales: dict[Place, torch.Tensor] = {}
    groups: dict[str, dict[str, float]] = {}
    chosen = range(source.numbers.layers) if layers is None else layers
    with Workers(threads) as workers:
        for done, layer in enumerate(chosen):
            progress(done, len(chosen), f"scales of layer {layer}")
            for place in rescalable(source, layer):
                first = block_tensor(layer, source.family.readers(place[1])[0].role)
                moment = moment_of(importance, source, first)
                if moment is None:
                    continue
                group = _Group(source, place, rounding, moment)
                best, errors = group.best(ALPHAS if alpha is None else (0.0, alpha), workers)
                best = best if alpha is None else alpha
                scales[place] = scale_of(group.shared, best)
                told = {"alpha": best, "unscaled": digits(errors[0.0]), "error": digits(errors[best])}
                groups[place_name(place)] = told
    return Rescaling(scales, groups)
