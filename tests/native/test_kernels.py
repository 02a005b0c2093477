"""Every kernel of every instruction set that this machine has, against the scalar one, which is the specification."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rondel.native import formats, instruction_set, instruction_sets, use_instruction_set
from rondel.quant.hadamard import base_matrix
from tests.packed import EVERY, FLOATS, GGML, block_of, ggml_number, random_packed
from tests.peer.ggml import ggml_product, has_avx2_order
from tests.peer.llama import find_library

ROWS = 19  # a whole panel and a part
FAST = [isa for isa in instruction_sets() if isa != "scalar"]

# Every instruction set gives the same bits. Against exact sums and other orders: at most 1024 additions in single
# precision, whose error relative to the sum of magnitudes stays far below 1024 * 2^-24, and in practice near
# sqrt(1024) * 2^-24 = 2e-6.
SUMMATION = 4e-6
# Formats whose products llama.cpp's AVX2 build adds in another order for one row than for eight interleaved ones (Q4_K:
# rondel has the latter, which is how it decodes), in two running sums, or in a vector of another width.
OTHER_ORDER = {"BF16", "Q1_0", "Q2_0", "Q4_K", "IQ4_NL", "MXFP4", "TQ1_0", "IQ1_S", "IQ1_M"}
# Float64 may hold any of these sums; float32 only integers below this.
EXACT_LIMIT = 2**24
LENGTHS = [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 1024]


@pytest.fixture(params=FAST)
def isa(request):
    before = instruction_set()
    yield request.param
    use_instruction_set(before)


def product(isa, name, packed, cols, inputs, rows=ROWS):
    use_instruction_set(isa)
    return formats.matmul(name, packed, rows, cols, inputs)


def magnitude(name, packed, cols, inputs):
    """Sum of |weight| |activation| of each output: what a summation error is relative to."""
    weights = np.abs(formats.decode(name, packed, ROWS, cols).astype(np.float64))
    return np.abs(inputs.astype(np.float64)) @ weights.T + 1e-30


def integer_inputs(rng, n, cols):
    """Integers up to 127, with 127 in every 32: each kind of activation keeps them as they are, with scale 1."""
    inputs = rng.integers(-127, 128, (n, cols)).astype(np.float32)
    inputs[:, ::32] = 127
    return inputs


@pytest.mark.parametrize("name", EVERY)
def test_integer_sums_are_exact(isa, name):
    cols, rng = 256, np.random.default_rng(1)
    packed = random_packed(name, ROWS, cols, rng, scale=1.0)
    if name == "Q6_K":  # sub-scales of -8..7 instead of -128..127, so that float32 can hold the sums
        packed.reshape(-1, 210)[:, 192:208] = rng.integers(-8, 8, (ROWS, 16)).astype(np.int8).view(np.uint8)
    if name == "IQ4_XS":  # likewise: high bits 10 and 01 in turn make scales of -16..15
        packed.reshape(-1, 136)[:, 2:4] = 0x66
    if name in FLOATS:
        integers = rng.integers(-128, 128, (ROWS, cols)).astype(np.float32)
        halves = integers.astype(np.float16).view(np.uint16)
        bits = {"F32": integers, "F16": halves, "BF16": (integers.view(np.uint32) >> 16).astype(np.uint16)}
        packed = bits[name].view(np.uint8).reshape(-1)
    inputs = integer_inputs(rng, 3, cols)
    weights = formats.decode(name, packed, ROWS, cols).astype(np.float64)
    expected = inputs.astype(np.float64) @ weights.T
    assert np.abs(inputs).astype(np.float64).dot(np.abs(weights).T).max() < EXACT_LIMIT
    np.testing.assert_array_equal(product("scalar", name, packed, cols, inputs), expected)
    np.testing.assert_array_equal(product(isa, name, packed, cols, inputs), expected)


def assert_same_bits(got, expected):
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 19])
@pytest.mark.parametrize("name", EVERY)
def test_random_weights_and_lengths(isa, name, blocks):
    cols, rng = blocks * block_of(name), np.random.default_rng(blocks)
    packed = random_packed(name, ROWS, cols, rng)
    inputs = rng.standard_normal((3, cols)).astype(np.float32)
    expected, got = product("scalar", name, packed, cols, inputs), product(isa, name, packed, cols, inputs)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("cols", LENGTHS)
@pytest.mark.parametrize("name", FLOATS)
def test_float_rows_of_any_length(isa, name, cols):
    rng = np.random.default_rng(cols)
    packed = random_packed(name, ROWS, cols, rng)
    inputs = rng.standard_normal((2, cols)).astype(np.float32)
    expected, got = product("scalar", name, packed, cols, inputs), product(isa, name, packed, cols, inputs)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("fill", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("name", [n for n in EVERY if n not in FLOATS])
def test_extreme_codes_and_activations(isa, name, fill):
    cols = 2 * block_of(name)
    packed = random_packed(name, ROWS, cols, np.random.default_rng(0), fill=fill, scale=1.0)
    columns = np.arange(cols)
    patterns = [np.ones(cols), -np.ones(cols), np.where(columns % 2, 1, -1), np.where(columns // 16 % 2, 1, -1)]
    inputs = 127 * np.array(patterns, np.float32)
    expected, got = product("scalar", name, packed, cols, inputs), product(isa, name, packed, cols, inputs)
    assert_same_bits(got, expected)
    exact = inputs.astype(np.float64) @ formats.decode(name, packed, ROWS, cols).astype(np.float64).T
    assert (np.abs(expected - exact) <= SUMMATION * magnitude(name, packed, cols, inputs)).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_activations_do_not_get_lost(name, bad):
    before = instruction_set()
    cols, rng = 2 * block_of(name), np.random.default_rng(8)
    packed = random_packed(name, ROWS, cols, rng)
    inputs = rng.standard_normal((1, cols)).astype(np.float32)
    inputs[0, cols // 2] = bad
    try:
        for isa in instruction_sets():
            assert not np.isfinite(product(isa, name, packed, cols, inputs)).any(), isa
    finally:
        use_instruction_set(before)


@pytest.mark.peer
@pytest.mark.skipif(find_library() is None, reason="no unmodified llama.cpp (extra `peer`)")
@pytest.mark.parametrize("name", GGML)
def test_products_are_llama_cpps(name):
    """Same integers, same scales, and in its AVX2 build the same order of float additions."""
    cols, rng = 1024, np.random.default_rng(11)
    packed = random_packed(name, ROWS, cols, rng)
    inputs = rng.standard_normal((2, cols)).astype(np.float32)
    expected = ggml_product(ggml_number(name), packed, ROWS, inputs)
    got = formats.matmul(name, packed, ROWS, cols, inputs)
    assert (np.abs(got - expected) <= SUMMATION * magnitude(name, packed, cols, inputs)).all()
    if has_avx2_order() and name not in OTHER_ORDER:
        assert_same_bits(got, expected)


# ---- the functions behind the table that no exported function shows alone ----

SOURCES = Path(__file__).parents[2] / "native" / "src"
FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni"))],
}
ACTIVATIONS = ["F32", "F16", "BF16", "Q8_0", "Q8_1", "Q8_K", "TILE_64", "TILE_128", "TILE_256"]  # enum activation
POINTER = ctypes.c_void_p
PACK = ctypes.CFUNCTYPE(None, POINTER, ctypes.c_int64, POINTER)
DOT = ctypes.CFUNCTYPE(ctypes.c_float, POINTER, POINTER, ctypes.c_int64)
AXPY = ctypes.CFUNCTYPE(None, POINTER, ctypes.c_float, POINTER, ctypes.c_int64)
SYLVESTER = ctypes.CFUNCTYPE(None, POINTER, POINTER, *[ctypes.c_int64] * 2, POINTER, ctypes.c_int64, ctypes.c_float)
SIGNED_SUMS = ctypes.CFUNCTYPE(None, POINTER, ctypes.c_int64, POINTER, POINTER, ctypes.c_float)
SWIGLU = ctypes.CFUNCTYPE(None, POINTER, POINTER, ctypes.c_int64)
TURN = ctypes.CFUNCTYPE(None, *[POINTER] * 4, *[ctypes.c_int64] * 2)


class Table(ctypes.Structure):
    """`struct kernels` of kernels.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("usable", POINTER),
        ("pack", PACK * len(ACTIVATIONS)),
        ("dot", POINTER * len(EVERY)),
        ("panel", POINTER * len(EVERY)),
        ("dot_f32", DOT),
        ("dot_f16", DOT),
        ("axpy_f32", AXPY),
        ("fma_f16", AXPY),
        ("sylvester", SYLVESTER),
        ("signed_sums", SIGNED_SUMS),
        ("swiglu", SWIGLU),
        ("turn", TURN),
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The kernels compiled once more with every symbol visible."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to look inside the library with")
    folder = tmp_path_factory.mktemp("kernels")
    for file in [
        *sorted((SOURCES / "kernels").glob("*.c")),
        *(SOURCES / n for n in ("error.c", "formats.c", "pool.c")),
    ]:
        flags = next((FLAGS[isa] for isa in ("avx512", "avx2") if file.stem.startswith(isa)), [])
        options = ["-std=gnu11", "-O1", "-fPIC", "-ffp-contract=off", "-I", SOURCES, "-I", SOURCES.parent / "include"]
        target = ["-DRONDEL_X86"] if FAST else []
        subprocess.run([compiler, *options, *target, *flags, "-c", file, "-o", folder / f"{file.stem}.o"], check=True)
    subprocess.run([compiler, "-shared", *folder.glob("*.o"), "-lm", "-lpthread", "-o", folder / "k.so"], check=True)
    loaded = ctypes.CDLL(str(folder / "k.so"))
    loaded.half_to_float.restype = ctypes.c_float
    loaded.float_to_half.restype = ctypes.c_uint16
    loaded.float_to_half.argtypes = [ctypes.c_float]
    loaded.activation_bytes.restype = ctypes.c_size_t
    loaded.activation_bytes.argtypes = [ctypes.c_int, ctypes.c_int64]
    return loaded


@pytest.fixture
def tables(library):
    return lambda isa: Table.in_dll(library, f"kernels_{isa}")


def test_the_tables_are_read_right(tables):
    for isa in instruction_sets():
        assert tables(isa).name == isa.encode()
        assert all(tables(isa).dot[i] or tables(isa).panel[i] for i in range(len(EVERY)))


@pytest.mark.parametrize("kind", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
def test_activations_have_the_same_bytes(library, tables, isa, kind):
    rng = np.random.default_rng(9)
    step = {"Q": 256 if ACTIVATIONS[kind] == "Q8_K" else 32, "T": 256}.get(ACTIVATIONS[kind][0], 1)
    ties = np.arange(-512, 512, dtype=np.float32) / 8  # with a largest value of 127: every kind of half integer
    ties[::32] = 127
    equal = np.where(np.arange(1024) % 3, 2.5, -2.5)  # several values of the largest magnitude
    samples = [rng.standard_normal(1024), rng.standard_cauchy(1024) * 1e4, ties, equal, np.zeros(1024)]
    samples += [np.full(1024, 1e-35), np.full(1024, 6e-8), rng.standard_normal(1024) * 1e-7]
    broken = rng.standard_normal(1024)
    broken[[100, 700]] = np.nan, -np.inf
    for values in (np.array(v, np.float32) for v in [*samples, broken]):
        for cols in sorted({step, 3 * step, 1024 // step * step}):
            size = library.activation_bytes(kind, cols)
            assert size % 64 == 0
            packed = {}
            for name in ("scalar", isa):
                memory = np.full(size + 64, 0x55, np.uint8)
                start = -memory.ctypes.data % 64
                tables(name).pack[kind](values.ctypes.data, cols, memory.ctypes.data + start)
                packed[name] = memory[start : start + size]
            np.testing.assert_array_equal(packed[isa], packed["scalar"])


@pytest.mark.parametrize("n", LENGTHS)
def test_float_rows(tables, isa, n):
    rng = np.random.default_rng(n)
    a, b = rng.standard_normal((2, n)).astype(np.float32)
    halves = a.astype(np.float16), b.astype(np.float16)
    fast, scalar = tables(isa), tables("scalar")
    limit = SUMMATION * float(np.abs(a * b).sum()) * 1.01 + 1e-30
    assert abs(fast.dot_f32(a.ctypes.data, b.ctypes.data, n) - float(a.astype(float) @ b)) <= limit
    assert abs(scalar.dot_f32(a.ctypes.data, b.ctypes.data, n) - float(a.astype(float) @ b)) <= limit
    exact = float(halves[0].astype(float) @ halves[1].astype(float))
    assert abs(fast.dot_f16(halves[0].ctypes.data, halves[1].ctypes.data, n) - exact) <= limit
    assert abs(scalar.dot_f16(halves[0].ctypes.data, halves[1].ctypes.data, n) - exact) <= limit
    for dot, (x, y) in (("dot_f32", (a, b)), ("dot_f16", halves)):
        both = [np.float32(getattr(table, dot)(x.ctypes.data, y.ctypes.data, n)) for table in (fast, scalar)]
        assert_same_bits(*both)
    for table in (fast, scalar):
        y = np.append(b, np.float32(7))  # the guard behind the row must survive
        table.axpy_f32(y.ctypes.data, 0.3, a.ctypes.data, n)
        np.testing.assert_allclose(y, np.append(b + np.float32(0.3) * a, 7), rtol=0, atol=1e-6)
        y = np.append(halves[1], np.float16(7))
        table.fma_f16(y.ctypes.data, 0.3, halves[0].ctypes.data, n)
        exact = halves[1].astype(float) + float(np.float32(0.3)) * halves[0].astype(float)  # in float64
        np.testing.assert_array_equal(y, np.append(exact.astype(np.float32).astype(np.float16), np.float16(7)))


@pytest.mark.parametrize("signs", [None, 0, 1, 4])  # absent, or the bit in a byte that the first one has
@pytest.mark.parametrize("length", [2**i for i in range(15)])
def test_sylvester_transforms(tables, isa, length, signs):
    count = 2**13 // length if length > 2**11 else 5  # 16384 once, and what does not fill whole vectors
    total, rng = max(count, 1) * length, np.random.default_rng(length)
    x = rng.standard_normal(total).astype(np.float32)
    bits = rng.integers(0, 2, total + 8 + 24)
    packed = np.packbits(bits, bitorder="little")
    flips = np.ones(total) if signs is None else 1.0 - 2.0 * bits[signs : signs + total]
    exact = (x * flips).reshape(-1, length)
    for half in (length >> i for i in range(1, length.bit_length())):
        pairs = exact.reshape(-1, 2, half)
        exact = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1)
    got = {}
    for name in ("scalar", isa):
        out = np.full(total + 1, 7, np.float32)  # the guard behind the row must survive
        pointer = None if signs is None else packed.ctypes.data
        tables(name).sylvester(x.ctypes.data, out.ctypes.data, total // length, length, pointer, signs or 0, 0.3)
        inside = np.append(x, np.float32(7))
        tables(name).sylvester(
            inside.ctypes.data, inside.ctypes.data, total // length, length, pointer, signs or 0, 0.3
        )
        assert_same_bits(inside, out)
        assert out[-1] == 7
        got[name] = out[:-1]
    assert_same_bits(got[isa], got["scalar"])
    limit = SUMMATION * np.abs(x).reshape(-1, length).sum(1).max()
    assert np.abs(got["scalar"] - np.float32(0.3) * exact.reshape(-1)).max() <= limit


class SignedSums(ctypes.Structure):
    """`struct signed_sums` of kernels.h."""

    _fields_ = [
        ("order", ctypes.c_int),
        ("transposed", ctypes.c_int),
        ("inner", ctypes.c_int64),
        ("terms", POINTER),
        ("signs", POINTER),
    ]


WRITTEN_OUT = (12, 20, 28, 44)
SUM_GROUPS, SUM_B, SUM_D, SUM_CD, SUM_MINUS = 8, 4, 2, 1, 8  # of kernels.h


def terms_of(matrix):
    """The table of a matrix, and the signs of its rows."""
    signs = matrix[:, 0]
    a, b, c, d = np.moveaxis(matrix.reshape(len(matrix), -1, 4), 2, 0)
    choice = SUM_B * (a != b) + SUM_D * (c != d) + SUM_CD * (a != c) + SUM_MINUS * (a != signs[:, None])
    group = np.arange(len(matrix) // 4) % SUM_GROUPS
    terms = (16 * (16 * group + choice)).astype(np.uint16)
    parts = [terms[:, first : first + SUM_GROUPS].ravel() for first in range(0, terms.shape[1], SUM_GROUPS)]
    return np.concatenate(parts), np.ascontiguousarray(signs)


# Side by side where `inner` is narrow: none of eight or sixteen, some, and a last that overlaps the one before.
COUNTS = [1, 3, 8, 9, 17, 40]


@pytest.mark.parametrize("inner", [1, 2, 4, 8, 12, 16, 20, 32, 60, 64, 912])
@pytest.mark.parametrize(
    ("order", "transposed"),
    [(12, 0), (12, 1), (20, 0), (20, 1), (28, 0), (28, 1), (44, 0), (44, 1), (36, 0), (76, 0), (172, 1)],
)
def test_signed_sums(tables, isa, order, transposed, inner):
    rng = np.random.default_rng(order * inner)
    matrix = base_matrix(order).numpy().astype(np.float32)  # the kernels know the small ones by heart
    if order not in WRITTEN_OUT:
        matrix = rng.choice(np.array([-1, 1], np.float32), (order, order))
    if transposed:
        matrix = np.ascontiguousarray(matrix.T)
    terms, signs = terms_of(matrix)
    base = SignedSums(order, transposed, inner, terms.ctypes.data, signs.ctypes.data)
    for count in COUNTS if inner < 16 else COUNTS[:2]:
        x = rng.standard_normal((count, order, inner)).astype(np.float32)
        x[0, :, 0] = 1  # sums to zeros, whose sign belongs to the bits
        got = {}
        for name in ("scalar", isa):
            out = np.full(x.size + 1, 7, np.float32)
            tables(name).signed_sums(ctypes.addressof(base), count, x.ctypes.data, out.ctypes.data, 0.3)
            assert out[-1] == 7
            got[name] = out[:-1].reshape(x.shape)
        assert_same_bits(got[isa], got["scalar"])
        if order in WRITTEN_OUT and inner % 16 == 0:
            for name in ("scalar", isa):
                inside = x.copy()
                tables(name).signed_sums(ctypes.addressof(base), count, inside.ctypes.data, inside.ctypes.data, 0.3)
                assert_same_bits(inside, got["scalar"])
        exact = np.float32(0.3) * (matrix.astype(np.float64) @ x)
        assert (np.abs(got["scalar"] - exact) <= SUMMATION * np.abs(x).sum(1, keepdims=True)).all()


@pytest.mark.parametrize("n", LENGTHS)
def test_swiglu(tables, isa, n):
    rng = np.random.default_rng(n)
    up = np.append(rng.standard_normal(n), 7).astype(np.float32)
    edges = [0.0, -0.0, 1e-30, 87.0, -87.0, 88.0, -88.7, -100.0, 134.0, -134.0, 1e30, -1e30, np.inf, np.nan]
    for values in (rng.standard_normal(n) * 8, np.resize(edges, n)):
        gate = np.append(values, 7).astype(np.float32)
        got, expected = gate.copy(), gate.copy()
        tables(isa).swiglu(got.ctypes.data, up.ctypes.data, n)
        tables("scalar").swiglu(expected.ctypes.data, up.ctypes.data, n)
        assert_same_bits(np.nan_to_num(got, nan=np.nan), np.nan_to_num(expected, nan=np.nan))
        assert got[n] == 7
        wide = gate[:n].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            exact = wide / (1 + np.exp(-wide)) * up[:n]
        # The polynomial, two divisions and products: a few units in the last place; far below 1 exp overflows a float.
        np.testing.assert_allclose(expected[:n], exact, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("pairs", [1, 4, 8, 20, 64])
def test_turns(tables, isa, pairs, step):
    rng = np.random.default_rng(pairs)
    head, angles = rng.standard_normal(2 * pairs).astype(np.float32), rng.uniform(-4, 4, pairs)
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    turned = {}
    for name in ("scalar", isa):
        x = np.append(head, np.float32(7))
        a, b = x.ctypes.data, x.ctypes.data + 4 * (pairs if step == 1 else 1)
        tables(name).turn(a, b, cosines.ctypes.data, sines.ctypes.data, pairs, step)
        assert x[-1] == 7
        turned[name] = x[:-1]
    assert_same_bits(turned[isa], turned["scalar"])
    pairwise = head.reshape(2, pairs) if step == 1 else head.reshape(pairs, 2).T
    exact = np.stack([pairwise[0] * cosines - pairwise[1] * sines, pairwise[0] * sines + pairwise[1] * cosines])
    expected = exact.reshape(-1) if step == 1 else exact.T.reshape(-1)
    np.testing.assert_allclose(turned["scalar"], expected, rtol=0, atol=2e-6)  # of sums of two products below 16


def test_halves(library):
    halves = np.arange(1 << 16, dtype=np.uint16)
    values = halves.view(np.float16).astype(np.float32)
    for half, value in zip(halves[::7].tolist(), values[::7].tolist(), strict=True):
        got = library.half_to_float(ctypes.c_uint16(half))
        assert got == value or (got != got and value != value)
    rng = np.random.default_rng(10)
    bits = rng.integers(0, 1 << 32, 4000, dtype=np.uint32)
    finite = values[np.isfinite(values)]
    middle = (finite[:-1] + finite[1:]) / 2  # ties to even
    samples = np.concatenate([bits.view(np.float32), middle[::17], values[::31]])
    samples = samples[np.isfinite(samples)]
    with np.errstate(over="ignore"):
        expected = samples.astype(np.float16).view(np.uint16)
    got = np.array([library.float_to_half(float(v)) for v in samples], np.uint16)
    np.testing.assert_array_equal(got, expected)
