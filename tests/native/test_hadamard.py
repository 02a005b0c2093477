"""Does the runtime's Hadamard transform do what quant/hadamard.py does, and refuse what has no plan?"""

import numpy as np
import pytest
import torch

from rondel.native.library import NativeError, check, ffi, lib
from rondel.quant.hadamard import hadamard_transform, random_signs, unpack_signs

# float32 sums of at most a few hundred terms, in another order than torch's.
FLOAT32_TOLERANCE = 1e-5


def native(x: np.ndarray, block: int, signs: str) -> np.ndarray:
    out = np.ascontiguousarray(x, dtype=np.float32)
    pointer = ffi.cast("float *", ffi.from_buffer(out, require_writable=True))
    check(lib.rondel_hadamard(pointer, out.shape[0], out.shape[1], block, bytes.fromhex(signs)))
    return out


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (1, 1),
        (2, 2),
        (12, 12),
        (64, 64),
        (52, 52),
        (92, 4),
        (96, 96),
        (172, 172),
        (240, 240),
        (352, 352),
        (688, 344),
        (768, 256),
        (6656, 6656),
        (8960, 8960),
        (10944, 10944),
        (11008, 11008),
    ],
)
def test_equals_the_offline_transform(size, block):
    x = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32)
    signs = random_signs(size, 7, "hidden")
    expected = hadamard_transform(torch.from_numpy(x).double() * unpack_signs(signs, size), block).numpy()
    assert np.abs(native(x, block, signs) - expected).max() < FLOAT32_TOLERANCE * np.abs(x).max()


@pytest.mark.parametrize(("size", "block"), [(92, 92), (128, 96), (64, 0), (64, -4), (0, 1), (2**40, 2**40)])
def test_refuses_what_it_cannot_plan(size, block):
    data = ffi.new("float[1]")
    with pytest.raises(NativeError, match=r"Hadamard"):
        check(lib.rondel_hadamard(data, 0, size, block, b"\0" * 32))
