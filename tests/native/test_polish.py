"""Coordinate descent on rounded blocks: it never loses, what it gains, and moments or gradients that are no numbers."""

from __future__ import annotations

import numpy as np
import pytest

from rondel.native.formats import decode, encode, encode_feedback, feeds_back, formats, polish
from rondel.native.library import NativeError
from tests.packed import decoded_by_reference

from .test_feedback import factor, output_error, second_moment, some_weights

FORMATS = tuple(name for name in formats() if feeds_back(name))

# The gradient is float32: a move that is worth less than its rounding may be taken the wrong way.
ROUNDING = 1 + 1e-5
# One sweep after rounding column by column, output error on inputs as correlated as in test_feedback.py. Measured: 0.72
# to 0.93.
MARGIN = 0.97


def polished(name: str, packed: np.ndarray, weights: np.ndarray, moment: np.ndarray) -> np.ndarray:
    gradient = (weights - decode(name, packed, *weights.shape)) @ moment
    return polish(name, packed, gradient.astype(np.float32), moment.astype(np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_a_sweep_after_feedback_lowers_the_output_error(name: str) -> None:
    block = formats()[name].block
    weights, moment = some_weights(block), second_moment(block)
    upper = factor(moment)
    packed, _ = encode_feedback(name, weights, 1 / np.diag(upper) ** 2, upper)
    before = output_error(weights, decode(name, packed, *weights.shape), moment)
    after = output_error(weights, decode(name, polished(name, packed, weights, moment), *weights.shape), moment)
    assert after < MARGIN * before


@pytest.mark.parametrize("name", FORMATS)
def test_no_row_loses(name: str) -> None:
    block = formats()[name].block
    weights, moment = some_weights(block, rows=13, seed=3), second_moment(block, seed=4)
    weights[0], weights[1] = 0, 0.01
    packed = encode(name, weights)
    for _ in range(3):
        after = polished(name, packed, weights, moment)
        for row in range(len(weights)):
            old, new = (decode(name, codes, *weights.shape)[row] for codes in (packed, after))
            bound = ROUNDING * output_error(weights[row : row + 1], old, moment) + 1e-12
            assert output_error(weights[row : row + 1], new, moment) <= bound, row
        packed = after


@pytest.mark.parametrize("name", FORMATS)
def test_without_a_gradient_nothing_moves(name: str) -> None:
    block = formats()[name].block
    packed = encode(name, some_weights(block))
    kept = polish(name, packed, np.zeros((24, block), np.float32), second_moment(block).astype(np.float32))
    assert np.array_equal(decode(name, kept, 24, block), decode(name, packed, 24, block))


@pytest.mark.parametrize("name", [name for name in FORMATS if not formats()[name].tiled])
def test_gguf_decodes_polished_blocks_alike(name: str) -> None:
    block = formats()[name].block
    weights, moment = some_weights(block), second_moment(block)
    packed = polished(name, encode(name, weights), weights, moment)
    theirs = decoded_by_reference(name, packed, len(weights))
    assert np.array_equal(theirs, decode(name, packed, *weights.shape))


def test_what_is_not_a_number_is_refused() -> None:
    weights, moment = some_weights(256), second_moment(256).astype(np.float32)
    packed, gradient = encode("Q2_K", weights), np.zeros((24, 256), np.float32)
    gradient[3, 7] = np.nan
    with pytest.raises(NativeError, match="gradient is not finite at row 3, column 7"):
        polish("Q2_K", packed, gradient, moment)
    moment[5, 5] = 0
    with pytest.raises(NativeError, match="second moment is 0 at row 5, column 5"):
        polish("Q2_K", packed, np.zeros((24, 256), np.float32), moment)
    with pytest.raises(NativeError, match="does not polish F16"):
        polish("F16", encode("F16", weights), gradient, moment)
