"""Candidates: the formats that a matrix may get, and what each would add to the KL divergence of the model's answers.

A sample of the matrix's rows is encoded and decoded in every candidate. The errors cost 1/2 sum_r s_r e_r H e_r^T,
where s_r is the sensitivity of row r and H the second moment of what the matrix reads (see sensitivity.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import EMBEDDING, OUTPUT
from rondel.converters.stats import Stats
from rondel.native.formats import NativeError, decode, encode, formats
from rondel.quant.factorization import factorize
from rondel.quant.importance import Means, site_of
from rondel.quant.rounding import row_pieces
from rondel.quant.sensitivity import Sensitivity
from rondel.quant.workers import Workers

# What every llama.cpp since spring 2024 reads, for rows that fill blocks of 256 and for those that fill blocks of 32.
WIDE = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K"),
    *("Q5_K", "Q6_K", "Q8_0", "F16"),
)
NARROW = ("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16")
ANY = ("F16",)
SAMPLE_ROWS = 64  # of each matrix: relative errors differ little between rows, so their mean is known to two percent

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Use:
    """One way in which a matrix's errors reach the answers: row weights (rows,), and H (cols, cols) or its diagonal."""

    rows: Doubles
    moment: torch.Tensor

    @property
    def diagonal(self) -> Doubles:
        """The diagonal of H (cols,)."""
        return (self.moment if self.moment.dim() == 1 else self.moment.diagonal()).to(torch.float64).numpy()


@dataclass(frozen=True)
class Cost:
    """What one format loses on one matrix: nats a token, and its share of what losing the matrix would cost."""

    nats: float
    error: float


def candidates(cols: int) -> tuple[str, ...]:
    """The formats that rows of `cols` weights fill, by size."""
    block = {name: format.block for name, format in formats().items()}
    return next(names for names in (WIDE, NARROW, ANY) if all(cols % block[name] == 0 for name in names))


def uses_of(source: Checkpoint, stats: Stats, sensitivity: Sensitivity, name: str) -> list[Use]:
    """How the errors of a matrix reach the answers; an embedding that is the head as well does so in two ways."""
    uses = []
    if name == EMBEDDING:
        uses.append(Use(sensitivity.frequency, torch.from_numpy(sensitivity.stream)))
        if OUTPUT in source:
            return uses
    role = OUTPUT if name == EMBEDDING else name
    layer, site = site_of(source, role)
    assert site is not None, f"{name} reads no site"
    moment = stats.second_moment(layer, site)
    uses.append(Use(sensitivity.rows[role], stats.diagonal(layer, site) if moment is None else moment))
    return uses


def column_weights(uses: Sequence[Use]) -> Means:
    """How much each column's squared error counts over all rows (cols,): the importance to encode a matrix with."""
    return np.sum([use.rows.sum() * use.diagonal for use in uses], axis=0).astype(np.float32)


def _weight_of_rows(weights: torch.Tensor, uses: Sequence[Use]) -> Doubles:
    """What losing each row would cost if columns were uncorrelated (rows,)."""
    parts = []
    for piece in row_pieces(*weights.shape):
        squares = weights[piece].to(torch.float32).square().numpy()
        parts.append(sum(use.rows[piece] * (squares @ use.diagonal.astype(np.float32)) for use in uses))
    return np.concatenate(parts)


def sample_rows(weight: Doubles) -> tuple[NDArray[np.int64], Doubles]:
    """At most SAMPLE_ROWS rows, and how many rows each stands for.

    They are drawn in proportion to `weight` at even distances (systematic sampling), so one that counts much may stand
    several times in the sample.
    """
    count = len(weight)
    total = weight.sum()
    if count <= SAMPLE_ROWS or not total > 0:
        rows = np.arange(min(count, SAMPLE_ROWS))
        return rows, np.full(len(rows), count / len(rows))
    heights = np.cumsum(weight)
    points = (np.arange(SAMPLE_ROWS) + 0.5) / SAMPLE_ROWS * heights[-1]
    rows = np.minimum(np.searchsorted(heights, points, side="right"), count - 1)
    return rows, heights[-1] / SAMPLE_ROWS / weight[rows]


def feedback_share(source: Checkpoint, stats: Stats, name: str, device: str = "cpu") -> float:
    """The share of a matrix's cost that error feedback is expected to leave.

    Feedback makes up for whatever the columns behind can: of the variance of a column's input, what they do not tell is
    left (1 / U_cc^2, where H^-1 = U^T U). Shares of this kind explain nine tenths of how the shares measured on text
    held out differ between the matrices of a model. The embedding is looked up, so little can be made up for.
    """
    layer, site = site_of(source, name)
    moment = stats.second_moment(layer, site) if site is not None else None
    if moment is None:
        return 1.0
    whole = moment.diagonal().to(torch.float64).sum()
    left = factorize(moment, device=device).upper.diagonal().to("cpu", torch.float64) ** -2
    return min(1.0, float(left.sum() / whole)) if whole > 0 else 1.0


def measure(
    name: str,
    weights: torch.Tensor,
    names: Sequence[str],
    uses: Sequence[Use],
    *,
    importance: Means | None,
    workers: Workers,
) -> dict[str, Cost]:
    """What each of the formats `names` costs the matrix `weights` (rows, cols).

    Raises RondelError where the weights are not finite.
    """
    chosen, counts = sample_rows(_weight_of_rows(weights, uses))
    values = weights[torch.from_numpy(chosen)].to(torch.float32).contiguous()
    moments = [use.moment.to(torch.float32) for use in uses]

    def cost(errors: torch.Tensor) -> float:
        total = np.zeros(len(chosen))
        for use, moment in zip(uses, moments, strict=True):
            outputs = errors @ moment if moment.dim() == 2 else errors * moment
            total += use.rows[chosen] * (outputs * errors).sum(1, dtype=torch.float64).numpy()
        return float(0.5 * (counts * total).sum())

    def measured(format: str) -> float:
        try:
            packed = encode(format, values.numpy(), importance)
        except NativeError as error:
            raise RondelError(f"{name}: {error}") from error
        return cost(torch.from_numpy(decode(format, packed, *values.shape)) - values)

    whole = cost(values)
    found = workers.map(measured, names)
    return {format: Cost(nats, nats / whole if whole > 0 else 0.0) for format, nats in zip(names, found, strict=True)}
