"""Does the runtime's Hadamard transform do what quant/hadamard.py does, and refuse what has no plan?"""

import numpy as np
import pytest
import torch

from rondel.native import instruction_set, instruction_sets, use_instruction_set
from rondel.native.library import NativeError, check, check_handle, ffi, lib
from rondel.quant.hadamard import hadamard_transform, random_signs, unpack_signs

# float32 sums of at most a few hundred terms, in another order than torch's.
FLOAT32_TOLERANCE = 1e-5


def native(x: np.ndarray, block: int, signs: bytes, transposed: bool = False) -> np.ndarray:
    out = np.ascontiguousarray(x, dtype=np.float32)
    pointer = ffi.cast("float *", ffi.from_buffer(out, require_writable=True))
    made = ffi.gc(
        check_handle(lib.rondel_hadamard_new(out.shape[1], block, signs, transposed)), lib.rondel_hadamard_free
    )
    check(lib.rondel_hadamard_rows(made, pointer, out.shape[0]))
    return out


# Every way through the kernels: Sylvester alone, bases alone, one to three bases on both sides of the widths of
# vectors, blocks whose signs begin inside a byte, many blocks side by side and what is left of them.
WAYS = [
    (1, 1),
    (2, 2),
    (12, 12),
    (24, 12),
    (36, 12),
    (64, 64),
    (52, 52),
    (92, 4),
    (96, 96),
    (128, 128),
    (144, 144),
    (172, 172),
    (240, 240),
    (252, 12),
    (340, 20),
    (352, 352),
    (592, 592),
    (688, 344),
    (768, 256),
    (6656, 6656),
    (9728, 76),
    (9728, 512),
    (11008, 344),
    (25600, 1024),
]
# Widths and hiddens of models that are in use.
MODELS = [
    *(768, 896, 1024, 1408, 1536, 2048, 2560, 2816, 3072, 3584, 4096, 4864, 5120, 5632, 6144, 7168, 8192, 8960, 9728),
    *(10944, 11008, 12288, 13824, 14336, 16384, 17408, 18432, 18944, 20480, 25600, 27648, 28672, 29568),
]
SIZES = [*WAYS, *((size, size) for size in MODELS)]


@pytest.mark.parametrize(("size", "block"), SIZES)
def test_equals_the_offline_transform(size, block):
    x = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32)
    signs = random_signs(size, 7, "hidden")
    expected = hadamard_transform(torch.from_numpy(x).double() * unpack_signs(signs, size), block).numpy()
    assert np.abs(native(x, block, bytes.fromhex(signs)) - expected).max() < FLOAT32_TOLERANCE * np.abs(x).max()


@pytest.mark.parametrize(("size", "block"), SIZES)
def test_the_transpose_turns_back(size, block):
    x = np.random.default_rng(size).standard_normal((2, size)).astype(np.float32)
    signs = bytes.fromhex(random_signs(size, 7, "boundary"))
    back = native(native(x, block, signs), block, signs, transposed=True)
    assert np.abs(back - x).max() < FLOAT32_TOLERANCE * np.abs(x).max()


@pytest.mark.parametrize(("size", "block"), SIZES)
def test_every_instruction_set_gives_the_same_bits(size, block):
    before = instruction_set()
    x = np.random.default_rng(size).standard_normal((2, size)).astype(np.float32)
    signs = bytes.fromhex(random_signs(size, 7, "hidden"))
    results = []
    try:
        for isa in instruction_sets():
            use_instruction_set(isa)
            results.append([native(x, block, signs, transposed).view(np.uint32) for transposed in (False, True)])
    finally:
        use_instruction_set(before)
    for result in results:
        np.testing.assert_array_equal(result, results[-1])


@pytest.mark.parametrize(("size", "block"), [(92, 92), (128, 96), (64, 0), (64, -4), (0, 1), (2**40, 2**40)])
def test_refuses_what_it_cannot_plan(size, block):
    with pytest.raises(NativeError, match=r"Hadamard"):
        check_handle(lib.rondel_hadamard_new(size, block, b"\0" * 32, 0))
