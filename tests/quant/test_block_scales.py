"""Scales of packed blocks: the weights they give are the decoder's, and folding changes nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rondel.converters.folder import Packed
from rondel.converters.row_gains import SCALE_OFFSETS
from rondel.converters.tiles import TILE_FORMATS
from rondel.native.formats import decode, encode, formats
from rondel.quant.block_scales import BlockScales, has_scales

ROWS, COLS = 20, 512  # tile formats pad 20 rows to two panels
FLOAT32_ERROR = 1e-6  # of the largest weight: d A + m B in another order
FORMATS = [name for name in (*SCALE_OFFSETS, *TILE_FORMATS) if formats()[name].encodes]


def packed(format: str) -> Packed:
    weights = np.random.default_rng(1).standard_normal((ROWS, COLS), np.float32)
    return Packed(torch.from_numpy(encode(format, weights)), format, (ROWS, COLS))


def decoded(one: Packed) -> torch.Tensor:
    return torch.from_numpy(decode(one.format, one.data.numpy(), ROWS, COLS))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_linear_in_its_scales(format: str) -> None:
    assert has_scales(format)
    before = packed(format)
    blocks = BlockScales(before)
    limit = FLOAT32_ERROR * float(decoded(before).abs().max())
    assert (blocks.weight(blocks.scales) - decoded(before)).abs().max() <= limit
    assert torch.equal(blocks.fold(blocks.scales).data, before.data)
    gains = torch.linspace(0.5, 2.0, blocks.scales.numel()).reshape(blocks.scales.shape)
    scales = (blocks.scales * gains).half().float()
    after = blocks.fold(scales)
    assert after.data.shape == before.data.shape
    assert not torch.equal(after.data, before.data)
    assert (blocks.weight(scales) - decoded(after)).abs().max() <= 2 * limit


def test_scales_beyond_float16_are_cut_and_what_is_no_number_is_refused() -> None:
    blocks = BlockScales(packed("Q4_0"))
    cut = BlockScales(blocks.fold(blocks.scales * 1e9))
    assert float(cut.scales.abs().max()) == float(np.finfo(np.float16).max)
    with pytest.raises(ValueError, match="no number"):
        blocks.fold(blocks.scales * float("nan"))
    assert not has_scales("MXFP4")
