"""Rounded activations: the runtime's bits are those of the reference, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rondel.native import NativeError
from rondel.native.library import check, ffi, lib
from rondel.quant.activation_rounding import round_activations

TURN_ERROR = 1e-6  # of float32 transforms that add in different orders, relative to the row's largest magnitude
ROWS, LAYER, PLACE, POSITION = 7, 5, 2, 1000


def inputs(channels: int = 96) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((ROWS, channels)).astype(np.float32)
    rows[2] = 0
    rows[3] *= 1e-30
    return rows


def native(x: np.ndarray, bits: int, scale: float = 1, seed: int = 0, rotation: int = 0) -> np.ndarray:
    out = x.copy()
    pointer = ffi.from_buffer("float[]", out, require_writable=True)
    check(
        lib.rondel_round_activations(pointer, len(x), x.shape[1], bits, scale, seed, rotation, LAYER, PLACE, POSITION)
    )
    return out


def reference(x: np.ndarray, **values: float) -> np.ndarray:
    given = {kind: np.array([value], np.float32) for kind, value in values.items()}
    return round_activations(torch.from_numpy(x), given, LAYER, PLACE, POSITION + np.arange(len(x))).numpy()


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize("seed", [0, 1, 32767])
def test_the_bits_are_the_references(bits: int, seed: int) -> None:
    x = inputs()
    expected = reference(x, act_bits=bits, act_scale=0.75, act_clip=1.25, rounding=seed)
    assert np.array_equal(native(x, bits, 0.75 * 1.25, seed), expected)
    assert not np.array_equal(expected, x)


@pytest.mark.parametrize("channels", [96, 64, 7])
def test_turned_rows_are_close_to_the_references(channels: int) -> None:
    x = inputs(channels)
    expected = reference(x, act_bits=16, rotation_seed=3)
    largest = np.abs(x).max(1, keepdims=True)
    grid = 2 * channels**0.5 / 32767  # a value next to a tie may fall to either side, and the turn spreads it
    assert np.all(np.abs(native(x, 16, rotation=3) - expected) <= (TURN_ERROR + grid) * largest)
    coarse = reference(x, act_bits=4, rotation_seed=3)
    assert np.all(np.abs(native(x, 4, rotation=3) - coarse) <= TURN_ERROR * largest)


def test_what_cannot_be_is_refused() -> None:
    for bits, seed in ((1, 0), (17, 0), (8, -1)):
        with pytest.raises(NativeError, match="2 to 16 bits"):
            native(inputs(), bits, 1, seed)
