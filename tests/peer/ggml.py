"""ggml's own encoders and dot products through their C interface, from the library that the peer brings along."""

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


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits_cpu`: how activations are prepared, the dot product, and its kind of activations."""

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        (
            "vec_dot",
            ctypes.CFUNCTYPE(
                None,
                ctypes.c_int,
                *[ctypes.c_void_p, ctypes.c_size_t] * 3,
                ctypes.c_int,
            ),
        ),
        ("vec_dot_type", ctypes.c_int),
    )


@cache
def _processor() -> ctypes.CDLL:
    found = find_library()
    assert found is not None, "ask find_library() first"
    _library()
    beside = sorted(found.parent.glob("libggml-cpu.*"))
    library = ctypes.CDLL(str(beside[0] if beside else found))
    library.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_Traits)
    library.ggml_cpu_init()
    return library


@cache
def has_avx2_order() -> bool:
    """Whether the peer adds floats in the order of its AVX2 kernels, which is rondel's on every processor.

    Its AVX-512 and Arm builds have more or fewer lanes, so their sums differ from both in the last bits.
    """
    return bool(_processor().ggml_cpu_has_avx2()) and not _processor().ggml_cpu_has_avx512()


def ggml_product(ggml_type: int, packed: np.ndarray, rows: int, inputs: np.ndarray) -> np.ndarray:
    """(n, rows): inputs (n, cols) times the packed (rows, cols) matrix transposed, as llama.cpp computes it."""
    traits = _processor().ggml_get_type_traits_cpu(ggml_type).contents
    prepare = _processor().ggml_get_type_traits_cpu(traits.vec_dot_type).contents.from_float
    inputs = np.ascontiguousarray(inputs, np.float32)
    n, cols = inputs.shape
    outputs, row_bytes = np.empty((n, rows), np.float32), packed.size // rows
    for i in range(n):
        activations = np.zeros(4 * cols + 64, np.uint8)  # no kind takes more than the floats themselves
        if traits.vec_dot_type:
            prepare(inputs[i].ctypes.data, activations.ctypes.data, cols)
        else:
            activations[: 4 * cols] = inputs[i].view(np.uint8)
        for r in range(rows):
            row, out = packed.ctypes.data + r * row_bytes, outputs[i, r:].ctypes.data
            traits.vec_dot(cols, out, 0, row, 0, activations.ctypes.data, 0, 1)
    return outputs
