"""The C encoders: layouts, errors below plain rounding (and ggml's), hostile weights, equal bytes on all threads."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rondel.converters.tiles import TILE_FORMATS, unpack_tiles
from rondel.native.formats import decode, encode, formats
from rondel.native.library import NativeError
from rondel.native.machine import instruction_set, instruction_sets, use_instruction_set
from tests.packed import decoded_by_reference
from tests.peer.ggml import ggml_encode
from tests.peer.llama import find_library

FLOATS = ("F32", "F16", "BF16")
BLOCKS = tuple(name for name, f in formats().items() if name not in FLOATS and f.encodes and not f.tiled)
TILES = tuple(name for name in formats() if formats()[name].tiled)
QUANTIZED = BLOCKS + TILES
CODEBOOKS = tuple(name for name in BLOCKS if name.startswith(("IQ1", "IQ2", "IQ3")))
NEEDS_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")  # ggml's encoder stops without

# Levels of a sub-block, its columns, and the whole scales of the superblock (None: one half per block).
SYMMETRIC = {
    "Q8_0": (-127, 127, 32, None),
    "Q5_0": (-16, 15, 32, None),
    "Q4_0": (-8, 7, 32, None),
    "Q3_K": (-4, 3, 16, 31),
    "Q6_K": (-32, 31, 16, 127),
}
AFFINE = {
    "Q4_1": (15, 32, None),
    "Q5_1": (31, 32, None),
    "Q2_K": (3, 16, 15),
    "Q4_K": (15, 32, 63),
    "Q5_K": (31, 32, 63),
}

ROUNDING = 1 + 1e-5  # float32 sums of the encoder against float64 sums here
# Relative error of a constant row: half a unit of a half-precision scale, which has 11 bits.
CONSTANT_ERROR = 2**-11 * (1 + 1e-6)
# Levels 1, 1.5, 2, 3, 4 times powers of two: between 1 and 1.5 the middle is a fifth away.
FP4_ERROR = 0.2
# IQ4_XS divides by up to 127 * 32, so d of small weights is subnormal: steps of 2^-24 in 3.2e-6 here, and of 1 in 32.
SUBNORMAL_ERROR = 2**-25 / 3.2e-6

UNBIASED = 1e-3  # what rounding the scales to halves leaves; without the gain Q2_K shrinks by 6e-2, Q4_K by 5e-3

random = np.random.default_rng


def some_weights(rows: int = 24, cols: int = 512, seed: int = 0) -> np.ndarray:
    """Heavy-tailed weights of the size that models have."""
    return (random(seed).standard_t(5, (rows, cols)) * 0.03).astype(np.float32)


def some_importance(cols: int = 512, seed: int = 1) -> np.ndarray:
    return np.exp(1.5 * random(seed).standard_normal(cols)).astype(np.float32)


def error(weights: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None = None) -> float:
    counts = np.ones(weights.shape[1]) if importance is None else importance.astype(np.float64)
    return float((np.square(weights.astype(np.float64) - decoded).sum(0) * counts).sum())


def round_trip(name: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    return decode(name, encode(name, weights, importance), *weights.shape)


def half(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float16).astype(np.float64)


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b != 0)


def plain_symmetric(name: str, weights: np.ndarray) -> np.ndarray:
    """Rounding with the largest magnitude on the outermost level, scales rounded once: no search at all."""
    low, high, columns, whole = SYMMETRIC[name]
    x = weights.astype(np.float64).reshape(len(weights), -1, columns)
    scale = np.abs(x).max(-1, keepdims=True) / (-low if whole else high)
    if whole:
        group = scale.reshape(len(weights), -1, 256 // columns)
        d = half(group.max(-1, keepdims=True) / whole)
        scale = (d * np.rint(ratio(group, d)).clip(0, whole)).reshape(scale.shape)
    else:
        scale = half(scale)
    return (scale * np.rint(ratio(x, scale)).clip(low, high)).reshape(weights.shape)


def plain_affine(name: str, weights: np.ndarray) -> np.ndarray:
    """Rounding with smallest and largest weight on the outermost levels, scales rounded once: no search at all."""
    top, columns, whole = AFFINE[name]
    x = weights.astype(np.float64).reshape(len(weights), -1, columns)
    least = np.minimum(x.min(-1, keepdims=True), 0 if whole else np.inf)
    scale = (x.max(-1, keepdims=True) - least) / top
    if whole:
        groups = [part.reshape(len(weights), -1, 256 // columns) for part in (scale, -least)]
        ds = [half(group.max(-1, keepdims=True) / whole) for group in groups]
        rounded = [d * np.rint(ratio(group, d)).clip(0, whole) for group, d in zip(groups, ds, strict=True)]
        scale, least = rounded[0].reshape(scale.shape), -rounded[1].reshape(least.shape)
    else:
        scale, least = half(scale), half(least)
    return (scale * np.rint(ratio(x - least, scale)).clip(0, top) + least).reshape(weights.shape)


@pytest.mark.parametrize("name", [*SYMMETRIC, *AFFINE])
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_below_plain_rounding(name: str, weighted: bool) -> None:
    weights, importance = some_weights(), some_importance() if weighted else None
    plain = plain_symmetric(name, weights) if name in SYMMETRIC else plain_affine(name, weights)
    assert error(weights, round_trip(name, weights, importance), importance) < error(weights, plain, importance)


@pytest.mark.parametrize("name", QUANTIZED)
def test_importance_lowers_the_weighted_error(name: str) -> None:
    weights, importance = some_weights(), some_importance()
    weighted = error(weights, round_trip(name, weights, importance), importance)
    assert weighted < error(weights, round_trip(name, weights), importance)


@pytest.mark.parametrize(
    "name",
    [
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q4_0",
        "Q4_1",
        "IQ4_NL",
        "IQ4_XS",
        *CODEBOOKS,
        "TQ1_0",
        "TQ2_0",
        "Q2_0",
        "U2-128",
        "U4-256",
    ],
)
def test_rounded_weights_are_not_shrunk(name: str) -> None:
    weights, importance = some_weights(), some_importance().astype(np.float64)
    decoded = round_trip(name, weights, importance)
    strength = (importance * weights * decoded).sum() / (importance * np.square(weights, dtype=np.float64)).sum()
    assert abs(strength - 1) < UNBIASED


@pytest.mark.parametrize("name", BLOCKS)
def test_gguf_package_reads_the_same_weights(name: str) -> None:
    weights = some_weights()
    packed = encode(name, weights, some_importance())
    theirs = decoded_by_reference(name, packed, len(weights))
    np.testing.assert_array_equal(theirs, decode(name, packed, *weights.shape))


@pytest.mark.parametrize("name", TILES)
def test_padding_rows_of_a_panel_have_no_scale(name: str) -> None:
    weights = some_weights(rows=5)
    _, scales = unpack_tiles(TILE_FORMATS[name], encode(name, weights), 16, 512)
    assert (scales[5:] == 0).all()
    assert (scales[:5] != 0).all()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_no_byte(name: str, threads: int) -> None:
    weights, importance = some_weights(rows=37), some_importance()
    np.testing.assert_array_equal(encode(name, weights, importance, threads=threads), encode(name, weights, importance))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("size", [1, 1e-6, 1e4])
def test_instruction_sets_write_the_same_bytes(name: str, size: float) -> None:
    weights, importance, best = np.float32(size) * some_weights(rows=4), some_importance(), instruction_set()
    written = {}
    for isa in instruction_sets():
        use_instruction_set(isa)
        written[isa] = encode(name, weights, importance)
    use_instruction_set(best)
    for packed in written.values():
        np.testing.assert_array_equal(packed, written[best])


@pytest.mark.parametrize("name", BLOCKS)
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    weights = some_weights(rows=6)
    together = encode(name, weights).reshape(6, -1)
    weights[::2] *= 100
    np.testing.assert_array_equal(encode(name, weights).reshape(6, -1)[1::2], together[1::2])


@pytest.mark.parametrize("name", QUANTIZED)
def test_importance_has_no_unit(name: str) -> None:
    weights, importance = some_weights(), some_importance()
    np.testing.assert_array_equal(encode(name, weights, importance), encode(name, weights, 1024 * importance))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"])
def test_blocks_that_do_not_fill_the_lanes(name: str) -> None:
    weights = some_weights(cols=512)
    np.testing.assert_array_equal(round_trip(name, weights[:, :96].copy()), round_trip(name, weights)[:, :96])


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("value", [0.7, -0.013, 3e4])
def test_constant_rows_keep_their_value(name: str, value: float) -> None:
    weights = np.full((3, 512), value, np.float32)
    if name == "MXFP4":
        assert np.abs(round_trip(name, weights) / weights - 1).max() <= FP4_ERROR
        return
    tolerance = SUBNORMAL_ERROR if name == "IQ4_XS" and abs(value) < 1 else CONSTANT_ERROR
    assert np.abs(round_trip(name, weights) / weights - 1).max() <= tolerance


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q5_K"])
def test_superblocks_of_positive_weights_add_their_mins(name: str) -> None:
    weights = (5 + random(0).uniform(-0.1, 0.1, (4, 256))).astype(np.float32)
    assert error(weights, round_trip(name, weights)) < error(weights, np.full_like(weights, 5))


@pytest.mark.parametrize("name", QUANTIZED)
def test_zeros_stay_zero(name: str) -> None:
    assert not round_trip(name, np.zeros((3, 512), np.float32)).any()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q3_K", "U4-64"])
def test_columns_that_were_never_seen(name: str) -> None:
    weights, importance = some_weights(), some_importance()
    importance[:256] = 0
    decoded = round_trip(name, weights, importance)
    assert error(weights[:, :256], decoded[:, :256]) < 0.1 * error(weights[:, :256], 0 * weights[:, :256])
    np.testing.assert_array_equal(encode(name, weights, 0 * importance), encode(name, weights))


@st.composite
def strange_rows(draw: st.DrawFn) -> np.ndarray:
    """Rows of one kind a block: normal, constant, one outlier, tiny, huge, zero."""
    generator = random(draw(st.integers(0, 2**32 - 1)))
    blocks = []
    for kind in draw(st.lists(st.sampled_from("ncoth0"), min_size=8, max_size=8)):
        block = generator.standard_normal(64) * 10.0 ** generator.integers(-6, 3)
        if kind == "c":
            block[:] = block[0]
        elif kind == "o":
            block[generator.integers(64)] *= 1000
        elif kind == "t":
            block *= 1e-9
        elif kind == "h":
            block *= 9e4 / np.abs(block).max()
        elif kind == "0":
            block[:] = 0
        blocks.append(block)
    return np.concatenate(blocks).clip(-9e4, 9e4).astype(np.float32).reshape(1, -1)  # U2 reaches 98256


@pytest.mark.parametrize("name", QUANTIZED)
@settings(max_examples=25, deadline=None)
@given(weights=strange_rows(), weighted=st.booleans())
def test_never_worse_than_dropping_the_weights(name: str, weights: np.ndarray, weighted: bool) -> None:
    importance = some_importance() if weighted else None
    decoded = round_trip(name, weights, importance)
    assert np.isfinite(decoded).all()
    columns = formats()[name].block if name in BLOCKS else int(name.partition("-")[2])
    counts = np.ones(512) if importance is None else importance.astype(np.float64)
    lost = (np.square(weights - decoded, dtype=np.float64) * counts).reshape(-1, columns).sum(1)
    whole = (np.square(weights, dtype=np.float64) * counts).reshape(-1, columns).sum(1)
    assert (lost <= whole * ROUNDING).all()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_an_outlier_that_loses_half_of_the_energy_is_not_worse_than_nothing(name: str) -> None:
    """IQ2_XXS has no zero: beside one outlier the smallest level of 31 weights costs about what the outlier wins."""
    weights = np.zeros((1024, 512), np.float32)
    weights[:, :32] = random(6).normal(size=(1024, 32)) * np.linspace(0.001, 0.015, 1024)[:, None]
    weights[:, 26] = np.linspace(1, 2, 1024)
    decoded = round_trip(name, weights)
    lost, whole = (np.square(one, dtype=np.float64).sum(1) for one in (weights - decoded, weights))
    assert (lost <= whole * ROUNDING).all()


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_the_scale_fits_an_offset_that_no_half_reaches(name: str) -> None:
    """Where the outlier matters little: the others come back within a step, and it as near as a half can be."""
    weights = np.random.default_rng(1).uniform(-200, 200, (1, 512)).astype(np.float32)
    importance = np.ones(512, np.float32)
    weights[0, 26::32], importance[26::32] = -9e4, 0.025
    decoded = round_trip(name, weights, importance)
    step = float(np.finfo(np.float16).max) / (15 if name == "Q4_1" else 31)
    assert np.abs(decoded - weights)[np.abs(weights) < 1e3].max() < step
    assert error(weights, decoded, importance) < 0.1 * error(weights, 0 * weights, importance)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_codebook_weights_of_equal_size_keep_their_signs(name: str) -> None:
    weights = some_weights(8)
    signs = np.where(weights < 0, -1.0, 1.0).astype(np.float32)
    wrong = (np.sign(round_trip(name, signs)) != signs).reshape(-1, 8).sum(1)
    odd = (signs.reshape(-1, 8) < 0).sum(1) % 2
    if name in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS"):
        np.testing.assert_array_equal(wrong, odd)  # seven signs and even parity: one of eight gives way
    elif name in ("IQ2_S", "IQ3_S"):
        assert not wrong.any()


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q2_0", "Q1_0"])
@pytest.mark.parametrize("weighted", [False, True])
def test_ternary_and_binary_weights_are_kept_exactly(name: str, weighted: bool) -> None:
    generator = random(4)
    scales = np.repeat(generator.uniform(0.01, 2, (8, 2)), 256, axis=1).astype(np.float16).astype(np.float32)
    levels = generator.choice([-1, 1] if name == "Q1_0" else [-1, 0, 1], (8, 512)).astype(np.float32)
    np.testing.assert_array_equal(
        round_trip(name, scales * levels, some_importance() if weighted else None), scales * levels
    )


def test_scales_of_q2_0_have_both_signs() -> None:
    weights = random(5).choice([-1.0, 0.0, 1.0, 2.0], (4, 64)).astype(np.float32)
    weights[1::2] *= -1
    np.testing.assert_array_equal(round_trip("Q2_0", weights), weights)


@pytest.mark.parametrize("name", [*QUANTIZED, *FLOATS])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused_with_its_place(name: str, bad: float) -> None:
    weights = some_weights()
    weights[17, 300] = bad
    with pytest.raises(NativeError, match=r"row 17, column 300 is not finite"):
        encode(name, weights)


@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q2_K", "U2-64"])
def test_weights_that_no_half_scale_reaches_are_refused(name: str) -> None:
    weights = some_weights()
    weights[3, 4] = 1e9
    with pytest.raises(NativeError, match="row 3, column 4"):
        encode(name, weights)


def test_bad_importance_and_shapes_are_refused() -> None:
    importance = some_importance()
    importance[7] = -1
    with pytest.raises(NativeError, match="column 7"):
        encode("Q4_K", some_weights(), importance)
    importance[7] = np.nan
    with pytest.raises(NativeError, match="column 7"):
        encode("Q4_K", some_weights(), importance)
    with pytest.raises(NativeError, match="256"):
        encode("Q4_K", some_weights(cols=96))


def test_float_formats_round_to_nearest_even() -> None:
    weights = np.concatenate(
        [some_weights(), np.array([[1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 65504] * 128], np.float32)]
    )
    np.testing.assert_array_equal(round_trip("F32", weights), weights)
    np.testing.assert_array_equal(round_trip("F16", weights), weights.astype(np.float16).astype(np.float32))
    theirs = gguf.quants.dequantize(
        gguf.quants.quantize(weights, gguf.GGMLQuantizationType.BF16), gguf.GGMLQuantizationType.BF16
    )
    np.testing.assert_array_equal(round_trip("BF16", weights), theirs)


@pytest.mark.peer
@pytest.mark.skipif(find_library() is None, reason="no llama.cpp here: install the extra `peer`")
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tails", [3, 6, 1000])
def test_error_is_not_above_that_of_ggml(name: str, weighted: bool, tails: int) -> None:
    if name in NEEDS_IMPORTANCE and not weighted:
        pytest.skip("ggml writes this format with an imatrix only")
    weights = (random(2).standard_t(tails, (32, 1024)) * 0.02).astype(np.float32)
    importance = some_importance(1024) if weighted else None
    ours = encode(name, weights, importance)
    theirs = ggml_encode(formats()[name].ggml_type, weights, importance, ours.size)
    mine, other = (error(weights, decode(name, packed, *weights.shape), importance) for packed in (ours, theirs))
    if name == "Q1_0" and not weighted:
        assert mine <= other * ROUNDING  # the mean magnitude is the best scale, and it is ggml's
    else:
        assert mine < other
