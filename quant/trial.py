"""Owns a trial of one group of linears: how much their outputs lose when they are rescaled and rounded.

The measure is output_error.py's, on the calibration statistics and on some of each matrix's rows, with the encoder
that the method will use; weights and statistics stay in memory while several scales are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import block_tensor
from rondel.native.formats import decode, feeds_back
from rondel.quant.factorization import Factor, factorize
from rondel.quant.feedback import feed_back
from rondel.quant.importance import Importance
from rondel.quant.output_error import every, moment_of, output_error, sampled
from rondel.quant.rescaled_view import Place, by_query_head, obstacle, over_query_heads
from rondel.quant.rounding import Encoder
from rondel.quant.workers import Workers

ROWS_MEASURED = 512  # of a matrix, evenly spread: a choice needs no more
SWEEPS = 1  # of coordinate descent: more take a few per cent off every candidate's error alike


@dataclass(frozen=True)
class Rounding:
    """How matrices will be rounded: the format of each, what encodes the rows given to it, and by what statistics."""

    formats: Mapping[str, str]
    encoder_of: Callable[[torch.Tensor], Encoder]
    weighted: bool  # by the mean squares of the columns
    feedback: bool = False  # and errors are taken out of the columns behind


def shared_means(source: Checkpoint, site: str, means: torch.Tensor) -> torch.Tensor:
    """The mean squares (d,) that a site's scales follow: query heads that share their values share their scales."""
    if site != "heads":
        return means
    return over_query_heads(by_query_head(means, source.numbers).mean(0), source.numbers)


class Trial:
    """The linears that read one place, and what they read: `moment` (d, d), or its diagonal (d,)."""

    def __init__(self, source: Checkpoint, place: Place, moment: torch.Tensor) -> None:
        layer, site = place
        self.names = [source.head()]
        if layer is not None:
            self.names = [block_tensor(layer, linear.role) for linear in source.family.readers(site)]
        self.weights = [sampled(source.read(name), ROWS_MEASURED) for name in self.names]
        self.moment = moment
        self.means = moment.diagonal() if moment.dim() == 2 else moment
        self.shared = shared_means(source, site, self.means)
        self.rescalable = obstacle(source, place) is None
        self._factor: Factor | None = None

    def errors(
        self,
        rounding: Rounding,
        scale: torch.Tensor | None,
        workers: Workers,
        counts: Mapping[str, torch.Tensor] | None = None,
    ) -> list[float]:
        """The relative output error of each linear with its columns multiplied by the scale (d,) F32, or by ones.

        `counts` (rows,) by a linear's name say how much its rows matter, with the mean one.
        """
        scale = torch.ones(len(self.means)) if scale is None else scale
        found = []
        for name, weights in zip(self.names, self.weights, strict=True):
            rounded = self._rounded(name, weights * scale, rounding, scale, workers) / scale
            count = (counts or {}).get(name)
            matter = None if count is None else every(count, ROWS_MEASURED)
            found.append(output_error(weights, rounded, self.moment, workers, matter))
        return found

    def _rounded(
        self, name: str, scaled: torch.Tensor, rounding: Rounding, scale: torch.Tensor, workers: Workers
    ) -> torch.Tensor:
        format = rounding.formats[name]
        if rounding.feedback and self.moment.dim() == 2 and feeds_back(format):
            packed = feed_back(scaled, self._factor_for(scale), format, workers, sweeps=SWEEPS)
        else:
            means = (self.means / scale.square()).numpy() if rounding.weighted else None
            packed = rounding.encoder_of(scaled)(format, scaled.numpy(), means, threads=workers.threads)
        return torch.from_numpy(decode(format, packed, *scaled.shape))

    def _factor_for(self, scale: torch.Tensor) -> Factor:
        """The factor of S^-1 H S^-1 from that of H: its inverse is (U S)^T (U S)."""
        self._factor = self._factor or factorize(self.moment)
        return Factor(self._factor.moments / torch.outer(scale, scale), self._factor.upper * scale)


def trial_at(source: Checkpoint, place: Place, importance: Importance) -> Trial | None:
    """The trial of a place, or None where nothing was measured."""
    layer, site = place
    first = source.family.readers(site)[0].role
    moment = moment_of(importance, source, block_tensor(int(layer or 0), first))
    return None if moment is None else Trial(source, place, moment)
