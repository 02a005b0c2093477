"""Affine rounding: the bytes decode, in gguf too, to what the formula says, at every granularity."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.ggml_blocks import BLOCK_FORMATS
from rondel.native.formats import NativeError, decode, encode
from rondel.quant import rtn
from rondel.quant.quantize import QuantizeConfig, plan, quantize
from rondel.quant.rtn import GRANULARITIES, AffineEncoder, grid_of
from tests.tiny import tiny_model

# By hand: columns of a block, the lowest and the highest level; with an offset the highest alone.
SYMMETRIC = {"Q4_0": (32, -8, 7), "Q5_0": (32, -16, 15), "Q8_0": (32, -128, 127)}
SYMMETRIC |= {"U2-64": (64, -1.5, 1.5), "U4-128": (128, -8, 7), "U8-256": (256, -128, 127)}
AFFINE = {"Q4_1": (32, 15), "Q5_1": (32, 31)}
FORMATS = (*SYMMETRIC, *AFFINE)
SHAPE = (24, 512)


def some_weights(seed: int = 0) -> np.ndarray:
    """Heavy tails, a row of zeros, a constant row, rows of one sign, and channels of very different size."""
    random = np.random.default_rng(seed)
    weights = (random.standard_t(4, SHAPE) * np.exp(random.standard_normal((SHAPE[0], 1)))).astype(np.float32)
    weights[3], weights[4] = 0, -0.7
    weights[5], weights[6] = np.abs(weights[5]), -np.abs(weights[6])
    return weights * np.float32(0.02)


def extremes(weights: np.ndarray, granularity: str, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest weight of each block's scope, (rows, cols)."""
    scopes = {
        "tensor": weights.reshape(1, 1, -1),
        "channel": weights.reshape(len(weights), 1, -1),
        "group": weights.reshape(len(weights), -1, group),
    }
    ends = [end(scopes[granularity], axis=2) for end in (np.min, np.max)]
    shape = (len(weights), weights.shape[1] // group)
    low, high = (np.repeat(np.broadcast_to(end, shape), group, axis=1) for end in ends)
    return low, high


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def expected(format: str, weights: np.ndarray, granularity: str) -> np.ndarray:
    """The formula of the method, column by column, in float32."""
    if format in AFFINE:
        group, top = AFFINE[format]
        low, high = extremes(weights, granularity, group)
        scale, least = half((high - low) / np.float32(top)), half(low)
        codes = np.divide(weights - least, scale, out=np.zeros_like(weights), where=scale > 0)
        return scale * np.rint(codes).clip(0, top) + least
    group, bottom, top = SYMMETRIC[format]
    low, high = extremes(weights, granularity, group)
    scale = half(np.maximum(np.abs(low), np.abs(high)) / np.float32(top))
    codes = np.divide(weights, scale, out=np.zeros_like(weights), where=scale > 0)
    zero = np.float32(-bottom)  # the code that means 0
    return scale * ((np.rint(codes + zero)).clip(0, top - bottom) - zero)


def rounded(format: str, weights: np.ndarray, granularity: str) -> np.ndarray:
    packed = AffineEncoder(torch.from_numpy(weights), granularity)(format, weights)
    return decode(format, packed, *weights.shape)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("format", FORMATS)
def test_decodes_to_the_formula(format: str, granularity: str) -> None:
    weights = some_weights()
    assert np.array_equal(rounded(format, weights, granularity), expected(format, weights, granularity))


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_gguf_reads_the_same(format: str) -> None:
    weights = some_weights(1)
    packed = AffineEncoder(torch.from_numpy(weights), "channel")(format, weights)
    kind = gguf.GGMLQuantizationType[format]
    read = gguf.quants.dequantize(packed.reshape(len(weights), -1), kind)
    assert np.array_equal(read, expected(format, weights, "channel"))


@pytest.mark.parametrize("format", FORMATS)
def test_coarser_scales_only_lose(format: str) -> None:
    weights = some_weights(2)
    errors = [np.square(rounded(format, weights, granularity) - weights).sum() for granularity in GRANULARITIES]
    assert errors == sorted(errors)
    assert errors[0] < errors[2]


@pytest.mark.parametrize("format", ["Q3_K", "IQ2_XXS", "IQ4_NL", "F16"])
def test_formats_without_a_grid_are_encoded_without_weights(format: str) -> None:
    weights, importance = some_weights(), np.arange(1, SHAPE[1] + 1, dtype=np.float32)
    assert grid_of(format) is None
    packed = AffineEncoder(torch.from_numpy(weights), "group")(format, weights, importance, threads=1)
    assert np.array_equal(packed, encode(format, weights))


def test_pieces_share_the_scale_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = some_weights()
    whole = rounded("U4-128", weights, "tensor")
    monkeypatch.setattr(rtn, "AT_ONCE", 16 * SHAPE[1])
    assert np.array_equal(rounded("U4-128", weights, "tensor"), whole)


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "row 2, column 5 is not finite"), (-np.inf, "row 2, column 5 is not finite"), (1e38, "beyond what Q4_1")],
)
def test_refuses_by_name_what_it_cannot_hold(value: float, message: str) -> None:
    weights = some_weights()
    weights[2, 5] = value
    with pytest.raises(NativeError, match=message):
        rounded("Q4_1", weights, "tensor" if np.isfinite(value) else "group")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("llama", tmp_path_factory.mktemp("model"), width=256, hidden=512, layers=1))


def test_quantize_by_channel(model: Checkpoint, tmp_path: Path) -> None:
    config = QuantizeConfig("Q4_0", method="rtn", granularity="channel")
    made = quantize(model, tmp_path / "out", config)
    name = "blk.0.ffn_down.weight"
    read = decode("Q4_0", made.packed(name).data.numpy(), *made.info(name).shape)
    assert np.array_equal(read, expected("Q4_0", model.read_float(name).numpy(), "channel"))
    assert made.info("output.weight").format == "Q6_K"  # the head keeps its format and the scales of its groups
    assert made.stages[-1]["config"]["granularity"] == "channel"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantizeConfig("Q2_K", method="rtn", granularity="tensor"), "blk.0.attn_q.weight becomes Q2_K.*group"),
        (QuantizeConfig("Q4_0", method="imatrix", granularity="channel"), "use --method rtn"),
        (QuantizeConfig("Q4_0", method="rtn", granularity="block"), "expected one of group, channel, tensor"),
    ],
)
def test_refuses_granularities_before_it_starts(model: Checkpoint, config: QuantizeConfig, message: str) -> None:
    with pytest.raises(RondelError, match=message):
        plan(model, config)
