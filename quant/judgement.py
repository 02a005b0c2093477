"""Owns how a candidate is judged: three disjoint pieces of the text, losses a token, and the paired test between two.

What is fitted on the first piece and chosen on the second is accepted or rejected on the third, once. The loss is the
Kullback-Leibler divergence from the teacher's distribution, whose differences are far less noisy than those of the
negative log-likelihood; the latter is measured beside it. Two candidates see the same tokens, so that their difference
is known 40 to 100 times better than either loss.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import log_softmax

from rondel.converters.errors import RondelError
from rondel.converters.replication import Replication
from rondel.quant.student import Student, Values, Weights

DELTA = 0.002  # nats a token: a smaller difference is not worth a second execution, however sure it is
BLOCK_TOKENS = 512  # neighbouring tokens err together; blocks of this size are taken as independent
SMALLEST_BLOCKS = 4  # of a piece that judges: the widened interval misses 6 % there; with three, 7 %
JUDGED_SHARE = 4  # a fourth of the text selects, a fourth confirms,
JUDGED_TOKENS = 32768  # but no more than this each: what is left is better used to fit
STRETCHES = 8  # of the text, each cut in three, so that all its kinds of documents are in every piece
RESAMPLES = 4000  # the ends of the interval are then known to about 3 % of its width
NORMAL_95, NORMAL_80 = 1.6449, 0.8416  # quantiles of the normal distribution: one-sided 95 %, and 80 % power
LOGITS_AT_ONCE = 1 << 22  # in float64 in memory: 32 MiB an array
BATCH_LOGITS = 1 << 24  # of one forward pass: 64 MiB in float32
REMEMBERED_BYTES = 1 << 30  # of the teacher's logits, which every candidate is compared with


class Teacher(Protocol):
    """What candidates are compared with."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (b, n, vocabulary) of token ids (b, n)."""
        ...


class RememberedTeacher:
    """A teacher whose logits are computed once for each batch of windows, as far as REMEMBERED_BYTES reach."""

    def __init__(self, teacher: Teacher, limit: int = REMEMBERED_BYTES) -> None:
        self.teacher = teacher
        self._left = limit
        self._known: dict[bytes, torch.Tensor] = {}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """As the teacher's, without gradients."""
        key = hashlib.sha256(f"{tuple(tokens.shape)}".encode() + tokens.cpu().numpy().tobytes()).digest()
        if key in self._known:
            return self._known[key]
        with torch.no_grad():
            logits = self.teacher.logits(tokens)
        size = logits.numel() * logits.element_size()
        if size <= self._left:
            self._left -= size
            self._known[key] = logits
        return logits


@dataclass(frozen=True)
class Splits:
    """Token windows (count, context) each: to fit on, to choose on, and to accept or reject on, once."""

    fit: torch.Tensor
    select: torch.Tensor
    confirm: torch.Tensor


@dataclass(frozen=True)
class Losses:
    """Per predicted token, float64 (tokens,), in nats and in the order of the text."""

    nll: NDArray[np.float64]
    kl: NDArray[np.float64]  # of the student's distribution from the teacher's

    def told(self) -> dict[str, float]:
        """The means."""
        return {"nll": float(self.nll.mean()), "kl": float(self.kl.mean())}


@dataclass(frozen=True)
class Verdict:
    """The mean of candidate minus base in nats a token: below zero, the candidate is better."""

    mean: float
    low: float  # each end of a one-sided 95 % interval
    high: float
    detectable: float  # the difference that this much text finds in four cases of five
    tokens: int
    blocks: int

    def better(self, delta: float = DELTA) -> bool:
        """Whether the candidate is surely better, and by more than `delta`."""
        return self.high < -delta

    def worse(self, delta: float = DELTA) -> bool:
        """Whether the candidate is surely worse, and by more than `delta`."""
        return self.low > delta

    def told(self) -> dict[str, float | int]:
        """As a plain dict for a record."""
        return asdict(self)


def split(windows: torch.Tensor, context: int) -> Splits:
    """Cut text into three pieces that share no window, and no document but those at the cuts.

    `windows` (count, context) or token ids (n,), both in the order of the text. Each of up to STRETCHES parts of the
    text gives neighbouring windows to each piece. Raises RondelError where the pieces that judge would have fewer than
    SMALLEST_BLOCKS blocks of BLOCK_TOKENS.
    """
    if windows.ndim == 1:
        windows = windows[: len(windows) // context * context].reshape(-1, context)
    assert windows.shape[1] == context, "windows of another context"
    count, block = len(windows), windows_a_block(context)
    needed = SMALLEST_BLOCKS * block * JUDGED_SHARE
    if count < needed:
        raise RondelError(
            f"the text has {windows.numel()} tokens in {count} windows of {context}; fitting, choosing and "
            f"confirming copies on pieces that do not overlap needs {needed * context}: give more --text"
        )
    judged = min(count // JUDGED_SHARE, max(JUDGED_TOKENS // context, SMALLEST_BLOCKS * block))
    stretches = min(STRETCHES, judged // block)
    pieces: tuple[list[torch.Tensor], ...] = ([], [], [])
    for i in range(stretches):
        start, end = (count * (i + n) // stretches for n in range(2))
        share = judged * (i + 1) // stretches - judged * i // stretches
        for piece, part in zip(pieces, windows[start:end].split((end - start - 2 * share, share, share)), strict=True):
            piece.append(part)
    return Splits(*(torch.cat(piece) for piece in pieces))


def windows_a_block(context: int) -> int:
    """How many windows of `context` tokens stand for BLOCK_TOKENS."""
    return math.ceil(BLOCK_TOKENS / context)


def token_losses(
    student: Student,
    teacher: Teacher,
    windows: torch.Tensor,
    replication: Replication | None = None,
    parameters: Sequence[Values] | None = None,
    *,
    weights: Weights | None = None,
) -> Losses:
    """The losses of the student on windows (count, context): every position but the last predicts the next token."""
    nll, kl = [], []
    with torch.no_grad():
        for batch in batches(windows, student.numbers.vocabulary):
            shown, following = batch[:, :-1], batch[:, 1:].reshape(-1, 1)
            base = teacher.logits(shown).flatten(0, 1)
            logits = student.logits(shown, replication, parameters, weights).flatten(0, 1)
            rows = max(1, LOGITS_AT_ONCE // logits.shape[1])
            for start in range(0, len(logits), rows):
                log_p = log_softmax(logits[start : start + rows].double(), -1)
                log_t = log_softmax(base[start : start + rows].double(), -1)
                nll.append(-log_p.gather(1, following[start : start + rows].to(log_p.device))[:, 0].cpu())
                kl.append((log_t.exp() * (log_t - log_p)).sum(1).cpu())
    return Losses(torch.cat(nll).numpy(), torch.cat(kl).numpy())


def batches(windows: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """Windows (count, context) as batches whose logits fit memory: the same for every candidate."""
    return windows.split(max(1, BATCH_LOGITS // (windows.shape[1] * vocabulary)))


def paired(candidate: NDArray[np.float64], base: NDArray[np.float64], seed: int, block: int = BLOCK_TOKENS) -> Verdict:
    """The mean difference of two models' losses a token (tokens,) with its interval, by block bootstrap.

    Blocks of `block` tokens are drawn with replacement (percentile ends; Künsch 1989, with blocks that do not overlap).
    The ends are widened for few blocks, as a t quantile is wider than a normal one.
    """
    assert candidate.shape == base.shape == (len(base),), "losses of different tokens"
    difference = candidate - base
    count = max(len(difference) // block, 1)
    edges = np.linspace(0, len(difference), count + 1).round().astype(int)
    means = np.array([difference[a:b].mean() for a, b in pairwise(edges)])
    mean = float(difference.mean())
    if count == 1:
        return Verdict(mean, -math.inf, math.inf, math.inf, len(difference), 1)
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    resampled = means[drawn].mean(axis=1)
    low, high = np.quantile(resampled, (0.05, 0.95))
    wider = math.sqrt(count / (count - 1)) * _t_quantile(count - 1) / NORMAL_95
    error = float(means.std(ddof=1)) / math.sqrt(count)
    return Verdict(
        mean,
        mean + wider * (float(low) - mean),
        mean + wider * (float(high) - mean),
        (NORMAL_95 + NORMAL_80) * error,
        len(difference),
        count,
    )


def _t_quantile(freedom: int) -> float:
    """Student's 95 % quantile, by the expansion around the normal one (2 % too small at 3 degrees of freedom)."""
    z = NORMAL_95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
