"""Sampling: what each setting keeps, distributions, ties, determinism."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rondel.native import NativeError, Sampler

PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32))
DRAWS = 4000
# Standard error of a share of 4000 draws is at most 0.008; five of them.
SHARE_ERROR = 0.04


def shares(logits: np.ndarray, **settings: Any) -> np.ndarray:
    sampler = Sampler(**(PLAIN | settings))
    drawn = [sampler.next(logits) for _ in range(DRAWS)]
    return np.bincount(drawn, minlength=len(logits)) / DRAWS


def test_plain_sampling_has_the_model_s_distribution() -> None:
    assert np.abs(shares(LOGITS) - np.exp(LOGITS)).max() < SHARE_ERROR


def test_temperature_flattens() -> None:
    expected = np.exp(LOGITS / 2) / np.exp(LOGITS / 2).sum()
    assert np.abs(shares(LOGITS, temperature=2.0) - expected).max() < SHARE_ERROR


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_top_k_keeps_the_k_best(k: int) -> None:
    kept = set(np.flatnonzero(shares(LOGITS, top_k=k)))
    assert kept == set(np.argsort(-LOGITS)[:k])


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.8, {1, 3, 4})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(np.flatnonzero(shares(LOGITS, top_p=top_p))) == kept


@pytest.mark.parametrize(("min_p", "kept"), [(0.9, {1}), (0.5, {1, 3}), (0.3, {1, 3, 4}), (0.01, {0, 1, 2, 3, 4})])
def test_min_p_is_relative_to_the_best(min_p: float, kept: set[int]) -> None:
    assert set(np.flatnonzero(shares(LOGITS, min_p=min_p))) == kept


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Sampler(temperature=0).next(np.array([1, 7, 7, 7, 2], np.float32)) == 1
    assert Sampler(temperature=-1).next(np.array([[3, 3]], np.float32)) == 0


@pytest.mark.parametrize("k", [1, 5, 40, 200])
def test_top_k_of_many_is_that_of_a_sort(k: int) -> None:
    generator = np.random.default_rng(0)
    logits = generator.integers(0, 50, 1000).astype(np.float32)  # many ties
    order = sorted(range(1000), key=lambda i: (-logits[i], i))[:k]
    sampler = Sampler(**(PLAIN | {"top_k": k, "temperature": 1e4}))  # flat: every candidate will be drawn
    assert {sampler.next(logits) for _ in range(40 * k)} == set(order)


def test_a_seed_decides_everything() -> None:
    logits = np.random.default_rng(1).standard_normal((50, 300)).astype(np.float32)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(seed=seed, temperature=1.5, top_k=100)
        return [sampler.next(row) for row in logits]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(-1) == draw(2**64 - 1)


def test_the_repetition_penalty_sees_only_the_window() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    sampler = Sampler(temperature=0, repeat_penalty=1.5, repeat_last=2)
    assert sampler.next(logits) == 0
    sampler.accept(0)
    assert sampler.next(logits) == 1  # 2.0 / 1.5 < 1.9
    sampler.accept(0)  # seen twice, penalized once
    assert sampler.next(logits) == 1
    sampler.accept(1)
    assert sampler.next(logits) == 0
    sampler.accept(2)
    sampler.accept(2)
    assert sampler.next(logits) == 0


def test_the_penalty_makes_negative_logits_smaller() -> None:
    sampler = Sampler(temperature=0, repeat_penalty=2.0)
    sampler.accept(0)
    assert sampler.next(np.array([-1.0, -1.5], np.float32)) == 1


def test_infinite_logits_can_be_sampled() -> None:
    masked = np.array([-np.inf, 1.0, -np.inf], np.float32)
    sampler = Sampler(**PLAIN)
    assert {sampler.next(masked) for _ in range(20)} == {1}


def test_damaged_logits_and_wrong_settings_are_sentences() -> None:
    with pytest.raises(NativeError, match="logit of token 1 is not a number"):
        Sampler().next(np.array([1.0, np.nan], np.float32))
    for wrong in ({"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -1.0}, {"temperature": np.inf}, {"repeat_penalty": 0.0}):
        with pytest.raises(NativeError, match="sampling needs"):
            Sampler(**wrong)
