"""Formats: sizes, decoding bit for bit against two witnesses, products against float64."""

import numpy as np
import pytest

from rondel.converters.errors import RondelError
from rondel.converters.ggml_types import GGML_TYPES
from rondel.converters.tiles import TILE_FORMATS, decode_tiles, pack_tiles, unpack_tiles
from rondel.native import formats
from rondel.native.library import NativeError
from tests.packed import (
    EVERY,
    FLOATS,
    GGML,
    TILES,
    block_of,
    decoded_by_reference,
    ggml_number,
    half_columns,
    random_packed,
)

ROWS = 37  # not a multiple of a panel

# Root mean square error of a product relative to the product itself, for Gaussian activations: float32 summation;
# rounding to 11 or 8 significant bits; int8 over 32 or 256 values (largest of 32 is about 2 sigma, of 256 about 2.8:
# sigma / 127 * 2.8 / sqrt(12) = 0.6 %), and weights with a mean make the same error weigh more.
PRODUCT_ERROR = {"F32": 1e-6, "F16": 1e-3, "BF16": 5e-3}
PRODUCT_ERROR_INT8 = 0.02


def same_bits(a, b):
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))


def test_the_table_has_every_format_once():
    assert sorted(formats.formats()) == sorted(EVERY)
    for name, entry in formats.formats().items():
        assert entry.block == block_of(name)
        expected = -1 if name in TILES else ggml_number(name)
        assert entry.ggml_type == expected
        assert entry.tiled == (name in TILES)


@pytest.mark.parametrize("name", EVERY)
def test_sizes(name):
    cols = 3 * block_of(name)
    if name in TILES:
        assert formats.format_bytes(name, ROWS, cols) == TILE_FORMATS[name].bytes(ROWS, cols)
        assert formats.format_bytes(name, 48, cols) == formats.format_bytes(name, ROWS, cols)
    else:
        kind = GGML_TYPES[name]
        assert formats.format_bytes(name, ROWS, cols) == ROWS * cols // kind.block * kind.bytes
    assert formats.format_bytes(name, 0, cols) == 0


@pytest.mark.parametrize("name", [n for n in EVERY if n not in FLOATS])
def test_a_row_that_does_not_fit_is_refused(name):
    with pytest.raises(NativeError, match=f"{name}: columns must be a multiple of {block_of(name)}"):
        formats.format_bytes(name, 2, block_of(name) + 8)


def test_errors_say_what_is_wrong():
    with pytest.raises(NativeError, match="unknown weight format 'Q9_Z'"):
        formats.format_bytes("Q9_Z", 1, 32)
    with pytest.raises(NativeError, match="2 x 9223372036854775776"):
        formats.format_bytes("Q8_0", 2, 2**63 - 32)
    with pytest.raises(NativeError, match="has 36 bytes, got 35"):
        formats.decode("Q4_0", np.zeros(35, np.uint8), 2, 32)
    with pytest.raises(NativeError, match="33 columns, the weights have 32"):
        formats.matmul("Q4_0", np.zeros(36, np.uint8), 2, 32, np.zeros((1, 33), np.float32))
    with pytest.raises(NativeError, match="threads >= 1"):
        formats.matmul("Q4_0", np.zeros(36, np.uint8), 2, 32, np.zeros((1, 32), np.float32), threads=0)


@pytest.mark.parametrize("name", GGML)
def test_decoding_equals_ggmls_reference(name):
    cols = 4 * block_of(name) if name not in FLOATS else 100
    packed = random_packed(name, ROWS, cols, np.random.default_rng(1))
    expected = decoded_by_reference(name, packed, ROWS)
    assert same_bits(formats.decode(name, packed, ROWS, cols), expected.reshape(ROWS, cols))


def test_decoding_covers_every_half():
    halves = np.arange(1 << 16, dtype=np.uint16)
    finite = halves[(halves & 0x7C00) != 0x7C00]
    decoded = formats.decode("F16", finite.view(np.uint8), 1, finite.size)
    assert same_bits(decoded[0], finite.view(np.float16).astype(np.float32))
    blocks = np.full((finite.size, 34), 1, np.uint8)
    blocks[:, :2] = finite.reshape(-1, 1).view(np.uint8)
    decoded = formats.decode("Q8_0", blocks.reshape(-1), finite.size, 32)
    assert same_bits(np.ascontiguousarray(decoded[:, 0]), finite.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("name", TILES)
def test_decoding_equals_the_numpy_twin(name):
    cols = 2 * block_of(name)
    packed = random_packed(name, ROWS, cols, np.random.default_rng(2))
    assert same_bits(formats.decode(name, packed, ROWS, cols), decode_tiles(TILE_FORMATS[name], packed, ROWS, cols))


@pytest.mark.parametrize("name", TILES)
def test_tiles_pack_what_they_unpack(name):
    tile, cols, rng = TILE_FORMATS[name], 2 * block_of(name), np.random.default_rng(3)
    low = -128 if tile.bits == 8 else 0
    codes = rng.integers(low, low + (1 << tile.bits), (ROWS, cols))
    scales = rng.standard_normal((ROWS, cols // tile.group)).astype(np.float16)
    packed = pack_tiles(tile, codes, scales)
    assert packed.size == formats.format_bytes(name, ROWS, cols)
    codes_again, scales_again = unpack_tiles(tile, packed, ROWS, cols)
    np.testing.assert_array_equal(codes_again, codes)
    np.testing.assert_array_equal(scales_again, scales)
    # formats.md: dword r of a tile belongs to row r; byte b, field f is column 4 f + b.
    row, column = 18, tile.group + 7  # second panel, second group
    fields = 8 // tile.bits
    tile_index, within = divmod(7, 4 * fields)
    frame = tile.bytes(16, tile.group)
    start = 2 * frame + frame + 64 * tile_index + 4 * (row - 16)
    byte = int(packed[start + within % 4])
    assert byte >> within // 4 * tile.bits & ((1 << tile.bits) - 1) == codes[row, column] % (1 << tile.bits)


def test_tiles_refuse_what_does_not_fit():
    tile = TILE_FORMATS["U2-64"]
    with pytest.raises(RondelError, match="multiple of 64 columns, got 96"):
        tile.bytes(16, 96)
    with pytest.raises(RondelError, match="codes 0 to 3, got 0 to 4"):
        pack_tiles(tile, np.arange(64).reshape(1, 64) % 5, np.ones((1, 1), np.float16))
    with pytest.raises(RondelError, match=r"scales of shape \(1, 1\)"):
        pack_tiles(tile, np.zeros((1, 64), np.int64), np.ones((1, 2), np.float16))
    with pytest.raises(RondelError, match="has 288 bytes, got 287"):
        unpack_tiles(tile, np.zeros(287, np.uint8), 1, 64)


@pytest.mark.parametrize("name", EVERY)
def test_a_product_is_close_to_float64(name):
    cols, rng = 512, np.random.default_rng(4)
    packed = random_packed(name, ROWS, cols, rng)
    inputs = rng.standard_normal((9, cols)).astype(np.float32)
    expected = inputs.astype(np.float64) @ formats.decode(name, packed, ROWS, cols).astype(np.float64).T
    error = np.sqrt(np.mean((formats.matmul(name, packed, ROWS, cols, inputs) - expected) ** 2))
    assert error <= PRODUCT_ERROR.get(name, PRODUCT_ERROR_INT8) * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("name", EVERY)
def test_a_product_does_not_depend_on_threads_or_on_the_other_columns(name):
    cols, rng = 256, np.random.default_rng(5)
    packed = random_packed(name, ROWS, cols, rng)
    inputs = rng.standard_normal((5, cols)).astype(np.float32)
    together = formats.matmul(name, packed, ROWS, cols, inputs)
    assert same_bits(formats.matmul(name, packed, ROWS, cols, inputs, threads=2), together)
    for i in range(5):
        assert same_bits(formats.matmul(name, packed, ROWS, cols, inputs[i : i + 1])[0], together[i])


def test_empty_products():
    assert formats.matmul("Q8_0", np.zeros(0, np.uint8), 0, 32, np.zeros((3, 32), np.float32)).shape == (3, 0)
    assert formats.matmul("Q8_0", np.zeros(34, np.uint8), 1, 32, np.zeros((0, 32), np.float32)).shape == (0, 1)


def test_half_columns_are_views():
    packed = random_packed("Q2_K", 1, 256, np.random.default_rng(6), fill=0, scale=1.0)
    assert [int(h[0, 0]) for h in half_columns("Q2_K", packed)] == [0x3C00, 0x3C00]
