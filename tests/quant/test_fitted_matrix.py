"""Whole numbers of packed blocks: reading and writing give the same bytes, and they mean what the decoder says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rondel.converters.folder import Packed
from rondel.converters.ggml_types import GGML_TYPES
from rondel.converters.row_gains import SCALE_OFFSETS
from rondel.converters.tiles import PANEL_ROWS, TILE_FORMATS
from rondel.native.formats import decode, format_bytes
from rondel.quant.block_codes import KINDS, read_numbers, with_numbers
from rondel.quant.block_layouts import codeword_fields, layouts
from rondel.quant.codewords import codebook
from rondel.quant.fitted_matrix import FittedMatrix, Rates

ROWS, COLS = 20, 512  # tile formats pad 20 rows to two panels
FLOAT32_ERROR = 2e-7  # of the largest weight: one fused rounding more or less
FORMATS = [*SCALE_OFFSETS, *TILE_FORMATS]
WITH_NUMBERS = [*layouts(), *TILE_FORMATS]
CODEWORDS = list(codeword_fields())
CODED = [name for name in WITH_NUMBERS if name in TILE_FORMATS or layouts()[name].codes is not None] + CODEWORDS


def drawn(format: str, seed: int = 1) -> Packed:
    """A matrix of random bytes with scales near one: every code and every inner scale occurs."""
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, format_bytes(format, ROWS, COLS), dtype=np.uint8)
    halves = generator.standard_normal(data.size).astype("<f2")
    if format in TILE_FORMATS:
        frames = data.reshape(-1, data.size // (-(-ROWS // PANEL_ROWS) * (COLS // TILE_FORMATS[format].group)))
        scales = halves[: len(frames) * PANEL_ROWS].reshape(-1, PANEL_ROWS)
        scales[len(frames) // 2 :, ROWS - PANEL_ROWS :] = 0  # those of rows that the second panel lacks
        frames[:, -2 * PANEL_ROWS :] = scales.view(np.uint8)
    else:
        blocks = data.reshape(-1, GGML_TYPES[format].bytes)
        for number, offset in enumerate(SCALE_OFFSETS[format]):
            field = halves[number * len(blocks) : (number + 1) * len(blocks)]
            blocks[:, offset : offset + 2] = field[:, None].view(np.uint8)
    return Packed(torch.from_numpy(data), format, (ROWS, COLS))


def decoded(one: Packed) -> torch.Tensor:
    return torch.from_numpy(decode(one.format, one.data.numpy(), ROWS, COLS)).reshape(ROWS, COLS)


def matrix(packed: Packed) -> FittedMatrix:
    return FittedMatrix(packed, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("format", WITH_NUMBERS)
def test_numbers_go_into_the_bytes_and_come_back(format: str) -> None:
    packed = drawn(format)
    numbers = read_numbers(packed)
    generator = np.random.default_rng(2)
    assert set(numbers) <= set(KINDS)
    assert numbers
    assert torch.equal(with_numbers(packed, {kind: known.values for kind, known in numbers.items()}).data, packed.data)
    others = {
        kind: generator.integers(0, known.top + 1, known.values.shape, dtype=np.int32)
        for kind, known in numbers.items()
    }
    changed = with_numbers(packed, others)
    assert not torch.equal(changed.data, packed.data)
    again = read_numbers(changed)
    assert all(np.array_equal(again[kind].values, values) for kind, values in others.items())
    back = with_numbers(changed, {kind: known.values for kind, known in numbers.items()})
    assert torch.equal(back.data, packed.data)


@pytest.mark.parametrize("format", FORMATS)
def test_fitted_matrices_are_what_the_decoder_says(format: str) -> None:
    packed = drawn(format)
    generator = torch.Generator().manual_seed(3)
    found = matrix(packed)
    assert torch.equal(found.stored().data, packed.data)
    limit = FLOAT32_ERROR * float(decoded(packed).abs().max())
    assert (found.weight() - decoded(packed)).abs().max() <= limit
    for real in found.reals.values():
        real.add_(torch.randint(-1, 2, real.shape, generator=generator) * 0.7)
    found.factors *= 0.5
    found.bound()
    stored = found.stored()
    assert stored.data.shape == packed.data.shape
    assert not torch.equal(stored.data, packed.data)
    assert (found.weight() - decoded(stored)).abs().max() <= 2 * limit


@pytest.mark.parametrize("format", CODED)
def test_gradients_reach_codes_through_their_rounding(format: str) -> None:
    found = matrix(drawn(format))
    codes = found.reals["codes"].requires_grad_()
    found.weight().sum().backward()
    assert codes.grad is not None
    steps = (codes.grad.reshape(ROWS, COLS) != 0).float().mean()
    assert steps > 0.8, "a block whose inner scale is zero has none"  # of 16 or more values of the inner scale
    leaves = found.leaves(Rates(1.0, 2.0, 3.0))
    assert leaves[0].rate == 1.0
    assert [leaf.rate for leaf in leaves if leaf.tensor is codes] == [2.0]
    assert len(leaves) == 1 + len(found.reals)


@pytest.mark.parametrize("format", CODEWORDS)
def test_codewords_go_into_the_bytes_and_the_nearest_is_found(format: str) -> None:
    packed, book = drawn(format), codebook(format)
    assert book is not None
    recorded = book.read(packed)
    assert torch.equal(book.nearest(recorded), recorded)
    noise = torch.randn(recorded.shape, generator=torch.Generator().manual_seed(4))
    near = recorded + noise / noise.norm(dim=1, keepdim=True) * book.safe * 0.99
    assert torch.equal(book.nearest(near), recorded), "another codeword is nearer than `safe` says"
    wanted = recorded + noise * book.step
    found = book.nearest(wanted)
    assert not torch.equal(found, recorded)
    nearer = (found - wanted).norm(dim=1) <= (recorded - wanted).norm(dim=1) * (1 + FLOAT32_ERROR)
    assert (
        nearer.float().mean() > 0.99
    )  # signs are settled before words, as encoders do: rarely a shorter way is missed
    changed = book.write(packed, found)
    assert torch.equal(book.read(changed), found)
    assert torch.equal(book.write(changed, recorded).data, packed.data)
