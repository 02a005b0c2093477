"""Owns the measure that methods are compared by: what a matrix's output loses, tr(E H E^T) with H the second moment.

E (rows, cols) is the rounded matrix less the true one and H (cols, cols) the mean of x x^T, so this is the mean squared
error of the layer's output over the calibration text. Where only the diagonal of H is known the inputs are taken as
uncorrelated. Rows are measured in pieces of a fixed size on one thread each: the same sums for any number of threads.
"""

from __future__ import annotations

import numpy as np
import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.quant.importance import Importance, site_of
from rondel.quant.workers import Workers

ROWS = 64  # in a piece


def moment_of(importance: Importance, source: Checkpoint, name: str) -> torch.Tensor | None:
    """The second moment (cols, cols) F32 of what a matrix reads; only its diagonal (cols,) where no more is known."""
    layer, site = site_of(source, name)
    stats = importance.stats
    if stats is not None and site is not None and stats.has(layer, site, "second_moment"):
        return stats.second_moment(layer, site)
    means = importance.of(source, name)
    return None if means is None else torch.from_numpy(means)


def energies(matrix: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """m H m^T of each float32 row m of a matrix (rows, cols); H may be a diagonal (cols,). Float64 (rows,)."""
    product = matrix @ moment if moment.dim() == 2 else matrix * moment
    return (product * matrix).sum(1, dtype=torch.float64)


def output_error(
    weights: torch.Tensor,
    decoded: torch.Tensor,
    moment: torch.Tensor,
    workers: Workers,
    counts: torch.Tensor | None = None,
) -> float:
    """tr(E H E^T) / tr(W H W^T) of weights W (rows, cols) that were rounded to `decoded`.

    `counts` (rows,), whose mean is one, says how much the error of each output channel matters.
    """

    def measure(first: int) -> tuple[float, float]:
        rows = weights[first : first + ROWS].to(torch.float32)
        error = decoded[first : first + ROWS].to(torch.float32) - rows
        lost = energies(error, moment)
        lost = lost if counts is None else lost * counts[first : first + ROWS]
        return float(lost.sum()), float(energies(rows, moment).sum())

    sums = list(workers.map(measure, range(0, len(weights), ROWS)))
    lost, whole = np.sum(sums, axis=0)
    return float(lost / whole) if whole > 0 else 0.0


def digits(error: float) -> float:
    """Six digits, for the manifest: the last ones of a sum depend on the machine."""
    return float(f"{error:.6g}")


def every(values: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the rows, evenly spread."""
    return values[:: -(-len(values) // most)]


def sampled(weights: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` rows, evenly spread, as contiguous float32."""
    return every(weights, most).to(torch.float32).contiguous()
