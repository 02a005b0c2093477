"""Perplexity of a text by llama.cpp's protocol, and the Kullback-Leibler divergence from another model's logits.

The text is cut into windows of `context` tokens without overlap; in each, the begin token (where the vocabulary adds
one) takes the first place, and the tokens after positions context/2 .. context-2 are scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rondel.converters.errors import RondelError
from rondel.converters.logits import LogitsFile, LogitsWriter
from rondel.converters.progress import Progress, silent

MIN_CONTEXT = 3  # the smallest window with a scored position
BLOCK = 1 << 22  # logits held in float64 at a time: 32 MiB an array
LEAST = -16.0  # nats: llama.cpp leaves out what the base model holds less likely

# evaluate(window, first): float32 logits of the positions `first` .. context - 1, (context - first, vocabulary)
Evaluate = Callable[[NDArray[np.int32], int], NDArray[np.float32]]


@dataclass
class Score:
    """Sums over scored tokens. Natural logarithms, float64."""

    nll: list[NDArray[np.float64]] = field(default_factory=list)
    kl: list[NDArray[np.float64]] = field(default_factory=list)
    nll_base: list[NDArray[np.float64]] = field(default_factory=list)
    same_top: int = 0

    def add(self, logits: NDArray[np.float32], following: NDArray[np.int32], base: NDArray[np.float32] | None) -> None:
        """Logits (rows, vocabulary), the token after each row, and the base model's log-probabilities or None."""
        rows = np.arange(len(following))
        log_p = log_softmax(logits)
        self.nll.append(-log_p[rows, following])
        if base is None:
            return
        log_base = base.astype(np.float64)
        likely = log_base > LEAST
        terms = np.exp(log_base, where=likely, out=np.zeros_like(log_base)) * np.where(likely, log_base - log_p, 0.0)
        self.kl.append(terms.sum(axis=1))
        self.nll_base.append(-log_base[rows, following])
        self.same_top += int((logits.argmax(axis=1) == base.argmax(axis=1)).sum())

    def result(self) -> dict[str, Any]:
        """perplexity, its standard error, nll, tokens; and with a base the divergences in nats a token."""
        nll = np.concatenate(self.nll)
        mean = float(nll.mean())
        perplexity = math.exp(mean)
        told: dict[str, Any] = {
            "perplexity": perplexity,
            "uncertainty": perplexity * standard_error(nll),
            "nll": mean,
            "tokens": len(nll),
        }
        if self.kl:
            kl, base = np.concatenate(self.kl), np.concatenate(self.nll_base)
            change = np.exp(-nll) - np.exp(-base)
            told |= {
                "mean_kl": float(kl.mean()),
                "median_kl": float(np.median(kl)),
                "kl_99_9": float(np.quantile(kl, 0.999)),
                "same_top": self.same_top / len(kl),
                "mean_kl_uncertainty": standard_error(kl),
                "max_kl": float(kl.max()),
                "base_perplexity": math.exp(float(base.mean())),
                "mean_probability_change": float(change.mean()),
                "rms_probability_change": float(np.sqrt(np.mean(change**2))),
            }
        return told


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities of each row, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean; 0 for a single value. Tokens are taken as independent, as llama.cpp does."""
    return float(values.std() / math.sqrt(len(values) - 1)) if len(values) > 1 else 0.0


def windows(tokens: Sequence[int], context: int, limit: int | None = None) -> NDArray[np.int32]:
    """The text's tokens cut into (windows, context); the rest at the end is left out."""
    if context < MIN_CONTEXT:
        raise RondelError(f"context {context}: expected at least {MIN_CONTEXT}, or no token of a window can be scored")
    count = len(tokens) // context
    if not count:
        raise RondelError(
            f"the text has {len(tokens)} tokens, less than one window of {context}: "
            "give a longer text or a smaller context"
        )
    if limit is not None:
        count = min(count, limit)
    return np.asarray(tokens[: count * context], np.int32).reshape(count, context)


def check_base(
    base: LogitsFile, cut: NDArray[np.int32] | None, vocabulary: int, limit: int | None = None
) -> NDArray[np.int32]:
    """The windows to score against `base`: its own, which must be those of the text (`cut`) where one is given."""
    if base.vocabulary != vocabulary:
        raise RondelError(
            f"{base.path}: logits over {base.vocabulary} tokens, this model has {vocabulary}: "
            "write the file with a model of the same vocabulary"
        )
    count = base.windows if limit is None else min(base.windows, limit)
    if cut is not None:
        count = min(count, len(cut))
        if cut.shape[1] != base.context or not np.array_equal(cut[:count], base.tokens[:count]):
            raise RondelError(
                f"{base.path}: made from another text or context (its context is {base.context}): give the same "
                "--text and --context, or write the file again with --save-base"
            )
    return base.tokens[:count]


def perplexity(
    cut: NDArray[np.int32],
    evaluate: Evaluate,
    *,
    begin: int | None = None,
    base: LogitsFile | None = None,
    save: LogitsWriter | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Score windows (count, context). `begin`: the token that takes the first place of each, or None."""
    count, context = cut.shape
    first, score = context // 2, Score()
    progress(0, count, "window")
    for number, window in enumerate(cut):
        shown = window.copy()
        if begin is not None:
            shown[0] = begin
        logits = evaluate(shown, first)[:-1]  # nothing follows the last position
        step = max(1, BLOCK // logits.shape[1])
        for start in range(0, len(logits), step):
            rows = logits[start : start + step]
            if not np.isfinite(rows).all():
                raise RondelError(
                    f"window {number}: the model's logits are not all finite; check it with rondel verify"
                )
            following = window[first + 1 + start : first + 1 + start + len(rows)]
            score.add(rows, following, base.rows(number, start, len(rows)) if base else None)
            if save:
                save.write(rows)
        progress(number + 1, count, "window")
    return score.result() | {"context": context, "windows": count}
