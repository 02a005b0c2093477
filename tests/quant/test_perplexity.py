"""Perplexity counts the tokens llama.cpp counts, and the divergences are those of the definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from rondel.converters.errors import RondelError
from rondel.converters.logits import LogitsFile, LogitsWriter
from rondel.quant import perplexity as measured
from rondel.quant.perplexity import check_base, perplexity, windows

CONTEXT, VOCABULARY = 16, 13
SIXTEEN_BITS = 3e-4  # nats: the base file keeps log-probabilities in steps of up to 16/65535
ROUNDING = 1e-12  # float64 sums in another order


class Model:
    """Logits that depend on the tokens before, so that a token in the wrong place changes the result."""

    def __init__(self, seed: int = 0, spread: float = 2.0) -> None:
        self.table = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY)) * spread
        self.seen: list[list[int]] = []

    def __call__(self, tokens: np.ndarray, first: int) -> np.ndarray:
        self.seen.append(tokens.tolist())
        sums = np.cumsum(self.table[tokens], axis=0) / np.arange(1, len(tokens) + 1)[:, None]
        return sums[first:].astype(np.float32)


def text(length: int, seed: int = 5) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def save(path: Path, cut: np.ndarray, model: Model) -> LogitsFile:
    with LogitsWriter(path, cut, VOCABULARY) as writer:
        perplexity(cut, model, begin=1, save=writer)
    return LogitsFile(path)


def test_windows_drop_the_rest_and_stop_at_the_limit() -> None:
    assert windows(text(50), CONTEXT).shape == (3, CONTEXT)
    assert windows(text(50), CONTEXT, limit=2).shape == (2, CONTEXT)
    assert windows(text(CONTEXT), CONTEXT).shape == (1, CONTEXT)


def test_too_short_is_one_sentence() -> None:
    with pytest.raises(RondelError, match="15 tokens, less than one window of 16"):
        windows(text(15), CONTEXT)
    with pytest.raises(RondelError, match="expected at least 3"):
        windows(text(15), 2)


@pytest.mark.parametrize("context", [3, 15, 16])
def test_second_half_is_scored_without_its_last_position(context: int) -> None:
    cut = windows(text(4 * context + 1), context)
    model = Model()
    told = perplexity(cut, model, begin=1)
    assert told["tokens"] == 4 * (context - 1 - context // 2)
    nll = []
    for window in cut:
        logits = Model()(np.array([1, *window[1:]]), 0).astype(np.float64)
        for position in range(context // 2, context - 1):
            p = np.exp(logits[position]) / np.exp(logits[position]).sum()
            nll.append(-math.log(p[window[position + 1]]))
    assert told["nll"] == pytest.approx(np.mean(nll), rel=ROUNDING)
    assert told["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=ROUNDING)
    error = told["perplexity"] * math.sqrt((np.mean(np.square(nll)) - np.mean(nll) ** 2) / (len(nll) - 1))
    assert told["uncertainty"] == pytest.approx(error, rel=1e-9)


def test_begin_token_takes_the_first_place_and_nothing_else() -> None:
    cut = windows(text(2 * CONTEXT), CONTEXT)
    before = cut.copy()
    model = Model()
    perplexity(cut, model, begin=1)
    assert [seen[0] for seen in model.seen] == [1, 1]
    assert [seen[1:] for seen in model.seen] == cut[:, 1:].tolist()
    assert np.array_equal(cut, before)
    plain = Model()
    perplexity(cut, plain)
    assert plain.seen == cut.tolist()


def test_divergence_from_itself_is_nothing(tmp_path: Path) -> None:
    cut = windows(text(10 * CONTEXT), CONTEXT)
    base = save(tmp_path / "base", cut, Model())
    told = perplexity(cut, Model(), begin=1, base=base)
    assert abs(told["mean_kl"]) < SIXTEEN_BITS
    assert told["same_top"] == 1.0
    assert told["base_perplexity"] == pytest.approx(told["perplexity"], rel=SIXTEEN_BITS)


def test_divergences_are_those_of_the_definition(tmp_path: Path) -> None:
    cut = windows(text(40 * CONTEXT), CONTEXT)
    base = save(tmp_path / "base", cut, Model(seed=1))
    told = perplexity(cut, Model(seed=2), begin=1, base=base)
    kl, same = [], []
    for window in cut:
        shown = np.array([1, *window[1:]])
        p, q = (Model(seed=seed)(shown, CONTEXT // 2)[:-1].astype(np.float64) for seed in (1, 2))
        log_p, log_q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p, q))
        kl += (np.exp(log_p) * (log_p - log_q)).sum(axis=1).tolist()
        same += (log_p.argmax(axis=1) == log_q.argmax(axis=1)).tolist()
    assert told["mean_kl"] == pytest.approx(np.mean(kl), abs=SIXTEEN_BITS)
    assert told["median_kl"] == pytest.approx(np.median(kl), abs=SIXTEEN_BITS)
    assert told["kl_99_9"] == pytest.approx(np.quantile(kl, 0.999), abs=4 * SIXTEEN_BITS)
    assert told["same_top"] == np.mean(same)
    assert 0 < told["same_top"] < 1


def test_blocks_of_rows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = windows(text(5 * CONTEXT), CONTEXT)
    base = save(tmp_path / "base", cut, Model(seed=1))
    whole = perplexity(cut, Model(seed=2), begin=1, base=base)
    monkeypatch.setattr(measured, "BLOCK", 3 * VOCABULARY)
    assert perplexity(cut, Model(seed=2), begin=1, base=base) == whole
    assert save(tmp_path / "again", cut, Model(seed=1)).path.read_bytes() == base.path.read_bytes()


def test_base_of_another_text_context_or_vocabulary_is_refused(tmp_path: Path) -> None:
    cut = windows(text(3 * CONTEXT), CONTEXT)
    base = save(tmp_path / "base", cut, Model())
    assert np.array_equal(check_base(base, None, VOCABULARY), cut)
    assert len(check_base(base, cut, VOCABULARY, limit=2)) == 2
    assert len(check_base(base, cut[:1], VOCABULARY)) == 1
    with pytest.raises(RondelError, match="logits over 13 tokens, this model has 14"):
        check_base(base, cut, VOCABULARY + 1)
    with pytest.raises(RondelError, match="made from another text"):
        check_base(base, windows(text(3 * CONTEXT, seed=6), CONTEXT), VOCABULARY)
    with pytest.raises(RondelError, match="its context is 16"):
        check_base(base, windows(text(3 * CONTEXT), 8), VOCABULARY)


def test_a_model_that_breaks_is_told_by_window() -> None:
    broken = Model()
    broken.table[3] = np.nan
    with pytest.raises(RondelError, match="window 0: the model's logits are not all finite"):
        perplexity(windows([3] * CONTEXT, CONTEXT), broken)
