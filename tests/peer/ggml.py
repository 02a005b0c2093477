"""ggml's own encoders through their C interface, from the library that the llama.cpp peer brings along."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

from tests.peer.llama import find_library


@cache
def _library() -> ctypes.CDLL:
    found = find_library()
    assert found is not None, "ask find_library() first"
    beside = sorted(found.parent.glob("libggml-base.*"))
    library = ctypes.CDLL(str(beside[0] if beside else found))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def ggml_encode(ggml_type: int, weights: np.ndarray, importance: np.ndarray | None, size: int) -> np.ndarray:
    """The bytes that ggml makes of (rows, cols) float32 weights with an imatrix row, or without."""
    weights = np.ascontiguousarray(weights, np.float32)
    rows, cols = weights.shape
    packed = np.empty(size, np.uint8)
    means = None if importance is None else np.ascontiguousarray(importance, np.float32)
    written = _library().ggml_quantize_chunk(
        ggml_type, weights.ctypes.data, packed.ctypes.data, 0, rows, cols, None if means is None else means.ctypes.data
    )
    assert written == size
    return packed
