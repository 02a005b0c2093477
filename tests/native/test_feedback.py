"""Error feedback in the encoders: errors against float64, what it gains, which scales it chooses, hostile input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rondel.native.formats import decode, encode, encode_feedback, feeds_back, formats, polish
from rondel.native.library import NativeError
from rondel.native.machine import instruction_set, instruction_sets, use_instruction_set
from tests.packed import decoded_by_reference

FORMATS = tuple(name for name in formats() if feeds_back(name))
CODEBOOKS = tuple(name for name in FORMATS if name.startswith(("IQ1", "IQ2", "IQ3")))

# Float32 recurrences over at most 256 columns against float64: each step rounds by 2^-24 of the weight, and an error is
# a fraction of a step of the grid: 1 in 8 of the weights for Q2_K, 1 in 256 and less for 8 bits.
RECURRENCE = 5e-4
# Feedback against the search that weighs columns by the diagonal, both judged by tr(E H E^T) on inputs as correlated as
# below. Measured: 0.44 (U2-256) to 0.71 (Q1_0).
MARGIN = 0.8

random = np.random.default_rng


def some_weights(block: int, rows: int = 24, seed: int = 0) -> np.ndarray:
    return (random(seed).standard_t(5, (rows, block)) * 0.03).astype(np.float32)


def second_moment(block: int, seed: int = 1) -> np.ndarray:
    """Of correlated inputs whose columns differ in size, dampened by a hundredth of the mean."""
    r = random(seed)
    mixed = r.standard_normal((block, block)) / np.sqrt(block) + np.eye(block)
    inputs = r.standard_normal((4 * block, block)) @ mixed * np.exp(0.5 * r.standard_normal(block))
    moment = inputs.T @ inputs / len(inputs)
    return np.asarray(moment + 0.01 * np.mean(np.diag(moment)) * np.eye(block))


def factor(moment: np.ndarray) -> np.ndarray:
    """U, upper triangular, of inverse second moment = U^T U."""
    return np.linalg.cholesky(np.linalg.inv(moment)).T.astype(np.float32)


def block_of(name: str) -> int:
    return formats()[name].block


def output_error(weights: np.ndarray, decoded: np.ndarray, moment: np.ndarray) -> float:
    error = weights.astype(np.float64) - decoded
    return float(((error @ moment) * error).sum())


def fed_back(name: str, weights: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed bytes, decoded weights and errors."""
    packed, errors = encode_feedback(name, weights, 1 / np.diag(upper) ** 2, upper)
    return packed, decode(name, packed, *weights.shape), errors


def errors_in_float64(weights: np.ndarray, decoded: np.ndarray, upper: np.ndarray) -> np.ndarray:
    left, factor = weights.astype(np.float64), upper.astype(np.float64)
    errors = np.zeros_like(left)
    for j in range(left.shape[1]):
        errors[:, j] = (left[:, j] - decoded[:, j]) / factor[j, j]
        left[:, j + 1 :] -= errors[:, j : j + 1] * factor[j, j + 1 :]
    return errors


@pytest.mark.parametrize("name", FORMATS)
def test_errors_are_those_of_the_packed_weights(name: str) -> None:
    weights, upper = some_weights(block_of(name)), factor(second_moment(block_of(name)))
    _, decoded, errors = fed_back(name, weights, upper)
    expected = errors_in_float64(weights, decoded, upper)
    assert np.abs(errors - expected).max() < RECURRENCE * np.abs(expected).max()


@pytest.mark.parametrize("name", FORMATS)
def test_feedback_lowers_the_output_error(name: str) -> None:
    weights, moment = some_weights(block_of(name)), second_moment(block_of(name))
    _, decoded, _ = fed_back(name, weights, factor(moment))
    plain = decode(name, encode(name, weights, np.diag(moment).astype(np.float32)), *weights.shape)
    assert output_error(weights, decoded, moment) < MARGIN * output_error(weights, plain, moment)


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_fed_back_without_correlation(name: str) -> None:
    weights = some_weights(block_of(name))
    _, decoded, errors = fed_back(name, weights, np.eye(block_of(name), dtype=np.float32))
    assert np.abs(errors - (weights - decoded)).max() < RECURRENCE * np.abs(errors).max()
    plain = decode(name, encode(name, weights), *weights.shape)
    assert (np.square(weights - decoded).sum(1) <= np.square(weights - plain).sum(1)).all()


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "MXFP4"])
def test_few_levels_are_the_plain_ones_without_correlation(name: str) -> None:
    """The plain search of these finds the best scale there is, and so the best codes: feedback has none to add."""
    weights = some_weights(block_of(name))
    _, decoded, _ = fed_back(name, weights, np.eye(block_of(name), dtype=np.float32))
    plain = decode(name, encode(name, weights), *weights.shape)
    levels = [np.rint(12 * made / np.abs(made).max(1, keepdims=True)) for made in (decoded, plain)]
    np.testing.assert_array_equal(*levels)


@pytest.mark.parametrize("name", FORMATS)
def test_instruction_sets_write_the_same_bytes(name: str) -> None:
    weights, moment = some_weights(block_of(name), rows=21), second_moment(block_of(name))
    upper, best, made = factor(moment), instruction_set(), []
    for isa in instruction_sets():
        use_instruction_set(isa)
        packed, decoded, errors = fed_back(name, weights, upper)
        gradient = ((weights - decoded) @ moment).astype(np.float32)
        made.append((packed, errors, polish(name, packed, gradient, moment.astype(np.float32))))
    use_instruction_set(best)
    for other in made[1:]:
        for one, same in zip(made[0], other, strict=True):
            np.testing.assert_array_equal(one, same)


@pytest.mark.parametrize("name", [name for name in FORMATS if not formats()[name].tiled])
def test_gguf_package_reads_the_same_weights(name: str) -> None:
    weights = some_weights(block_of(name))
    packed, decoded, _ = fed_back(name, weights, factor(second_moment(block_of(name))))
    theirs = decoded_by_reference(name, packed, len(weights))
    np.testing.assert_array_equal(theirs, decoded)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=20)
@given(rows=st.lists(st.sampled_from(["constant", "zero", "tiny", "huge", "spike", "usual"]), min_size=1, max_size=19))
def test_any_row_gives_finite_weights_and_errors(name: str, rows: list[str]) -> None:
    block = block_of(name)
    usual = some_weights(block, len(rows))
    kinds = {"constant": 0.3, "zero": 0.0, "tiny": 1e-30, "huge": 4e4}
    for row, kind in enumerate(rows):
        if kind in kinds:
            usual[row] = kinds[kind]
        elif kind == "spike":
            usual[row, row] = 1e3
    _, decoded, errors = fed_back(name, usual, factor(second_moment(block)))
    assert np.isfinite(decoded).all()
    assert np.isfinite(errors).all()


def test_hostile_input_is_refused() -> None:
    weights, upper = some_weights(256), factor(second_moment(256))
    broken = weights.copy()
    broken[3, 7] = np.nan
    with pytest.raises(NativeError, match="row 3, column 7 is not finite"):
        encode_feedback("Q4_K", broken, None, upper)
    for value in (np.nan, np.inf, 0, -1):
        other = upper.copy()
        other[5, 5] = value
        with pytest.raises(NativeError, match="row 5, column 5"):
            encode_feedback("IQ2_XS", weights, None, other)
    with pytest.raises(NativeError, match="one block of 32 columns"):
        encode_feedback("Q4_0", weights, None, upper)
    with pytest.raises(NativeError, match=r"upper has shape \(256, 255\)"):
        encode_feedback("Q4_K", weights, None, upper[:, 1:])
    with pytest.raises(NativeError, match="importance has shape"):
        encode_feedback("Q4_K", weights, np.ones(255, np.float32), upper)
    with pytest.raises(NativeError, match="does not write F16 with error feedback"):
        encode_feedback("F16", weights, None, upper)
    wild = np.triu(np.full((256, 256), 1e30, np.float32))
    np.fill_diagonal(wild, 1e-30)
    with pytest.raises(NativeError, match="dampen it"):
        encode_feedback("Q4_K", weights, None, wild)


# The output error with feedback against the plain search, on inputs that share a few directions. Each bound is the
# geometric mean of two measurements: the scales that feedback chooses, and codes with feedback under the plain scales.
CHOSEN = {
    "Q2_K": 0.084,
    "Q4_K": 0.045,
    "Q4_0": 0.064,
    "IQ2_XXS": 0.026,
    "IQ1_S": 0.018,
    "U2-128": 0.022,
    "TQ2_0": 0.034,
    "Q2_0": 0.128,
    "Q1_0": 0.184,
    "MXFP4": 0.104,
}


@pytest.mark.parametrize("name", CHOSEN)
def test_scales_are_chosen_with_feedback(name: str) -> None:
    block, r = block_of(name), random(2)
    inputs = r.standard_normal((512, 8)) @ r.standard_normal((8, block)) + 0.1 * r.standard_normal((512, block))
    moment = inputs.T @ inputs / 512 + 1e-3 * np.eye(block)
    weights, upper = some_weights(block), factor(moment)
    _, decoded, _ = fed_back(name, weights, upper)
    plain = decode(name, encode(name, weights, 1 / np.diag(upper) ** 2), *weights.shape)
    assert output_error(weights, decoded, moment) < CHOSEN[name] * output_error(weights, plain, moment)
