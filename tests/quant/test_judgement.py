"""Judgement: the pieces of the text, the losses of a token, and what the paired test calls better."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.errors import RondelError
from rondel.quant.judgement import (
    DELTA,
    JUDGED_TOKENS,
    SMALLEST_BLOCKS,
    STRETCHES,
    Losses,
    RememberedTeacher,
    batches,
    paired,
    split,
    token_losses,
)
from rondel.quant.student import Student
from tests.tiny import tiny_model

SUMS = 1e-5  # relative: float32 logits, summed in another order
TRIALS = 200
# Of intervals that should miss 5 %, this share misses at the most: 2.6 standard errors of TRIALS draws above.
MOST_MISSED = 0.09


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Student]:
    root = tmp_path_factory.mktemp("judged")
    return tuple(
        Student(open_checkpoint(tiny_model("llama", root / str(seed), seed=seed, vocabulary=64))) for seed in (0, 1)
    )  # type: ignore[return-value]


def test_the_pieces_share_nothing_and_come_from_all_parts_of_the_text() -> None:
    tokens = torch.arange(64 * 300)
    pieces = split(tokens, 64)
    joined = torch.cat((pieces.fit, pieces.select, pieces.confirm))
    assert torch.equal(joined.flatten().sort().values, tokens)
    assert len(pieces.select) == len(pieces.confirm) == 75
    assert torch.equal(split(tokens.reshape(-1, 64), 64).confirm, pieces.confirm)
    for piece in (pieces.fit, pieces.select, pieces.confirm):
        starts = piece[:, 0]
        assert bool((starts.diff() > 0).all()), "out of the text's order"
        parts = (starts * STRETCHES // len(tokens)).unique()
        assert len(parts) == STRETCHES
        apart = int((starts.diff() != 64).sum())
        assert apart < STRETCHES, "more cuts than the parts of the text need"


def test_of_much_text_most_is_left_to_fit() -> None:
    pieces = split(torch.zeros(8 * JUDGED_TOKENS, dtype=torch.int64), 512)
    assert pieces.select.numel() == pieces.confirm.numel() == JUDGED_TOKENS
    assert pieces.fit.numel() == 6 * JUDGED_TOKENS


def test_too_little_text_is_refused_with_the_count_that_would_do() -> None:
    with pytest.raises(RondelError, match=r"has 6400 tokens in 100 windows of 64; .* needs 8192"):
        split(torch.zeros(100, 64, dtype=torch.int64), 64)
    smallest = split(torch.zeros(8192, dtype=torch.int64), 64)
    assert smallest.confirm.numel() == SMALLEST_BLOCKS * 512


def test_losses_are_those_of_torch(models: tuple[Student, Student]) -> None:
    student, teacher = models
    windows = torch.randint(0, 64, (5, 16), generator=torch.Generator().manual_seed(2))
    losses = token_losses(student, teacher, windows)
    log_p = log_softmax(student.logits(windows)[:, :-1].flatten(0, 1), -1)
    log_t = log_softmax(teacher.logits(windows)[:, :-1].flatten(0, 1), -1)
    nll = cross_entropy(log_p, windows[:, 1:].flatten(), reduction="none")
    kl = kl_div(log_p, log_t, log_target=True, reduction="none").sum(1)
    np.testing.assert_allclose(losses.nll, nll.detach().numpy(), rtol=SUMS, atol=SUMS)
    np.testing.assert_allclose(losses.kl, kl.detach().numpy(), rtol=SUMS, atol=SUMS)
    assert token_losses(teacher, teacher, windows).kl.max() < SUMS


def test_a_remembered_teacher_answers_the_same_with_any_memory(models: tuple[Student, Student]) -> None:
    student, teacher = models
    windows = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(3))
    expected = token_losses(student, teacher, windows)
    for limit in (0, 1 << 20):
        remembered = RememberedTeacher(teacher, limit)
        for _ in range(2):
            np.testing.assert_array_equal(token_losses(student, remembered, windows).kl, expected.kl)


def test_batches_hold_every_window_once() -> None:
    windows = torch.arange(1000).reshape(100, 10)
    cut = batches(windows, 1 << 20)
    assert len(cut) > 1
    assert torch.equal(torch.cat(cut), windows)


def noise(seed: int, tokens: int = 8192, size: float = 0.01) -> np.ndarray:
    """Differences that err together in runs of 64 tokens, as neighbouring tokens of a text do."""
    generator = np.random.default_rng(seed)
    return np.repeat(generator.normal(0, size, tokens // 64), 64) + generator.normal(0, size, tokens)


def test_a_sure_gain_is_better_and_an_unsure_one_is_not() -> None:
    base = np.ones(8192)
    sure = paired(base - 0.01 + noise(0, size=0.005), base, 0)
    assert sure.better()
    assert sure.mean == pytest.approx(-0.01, abs=0.002)
    assert sure.low < sure.mean < sure.high < -DELTA
    assert not paired(base - 0.01 + noise(0, size=0.5), base, 0).better()
    assert not paired(base - DELTA / 2 + noise(0, size=0.0001), base, 0).better(), "sure, and too small to matter"
    assert paired(base + 0.01, base, 0).worse()


def test_the_interval_misses_one_truth_in_twenty() -> None:
    """With as few blocks as are allowed, where an unwidened interval would miss more than one in ten."""
    tokens = SMALLEST_BLOCKS * 512
    missed = sum(paired(noise(seed, tokens), np.zeros(tokens), seed).high < 0 for seed in range(TRIALS))
    assert missed / TRIALS <= MOST_MISSED


def test_the_verdict_is_the_seeds_and_no_block_is_no_verdict() -> None:
    difference = noise(5)
    assert paired(difference, np.zeros(8192), 3) == paired(difference, np.zeros(8192), 3)
    assert not paired(np.full(500, -1.0), np.zeros(500), 0).better()


def test_means_are_told() -> None:
    assert Losses(np.array([1.0, 3.0]), np.array([0.5, 0.5])).told() == {"nll": 2.0, "kl": 0.5}
