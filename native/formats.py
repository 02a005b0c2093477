"""Weight formats on numpy arrays: the format table, encode, decode, and the product as the runtime computes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from rondel.native.library import NativeError, check, ffi, lib

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """One weight format: ggml type number (-1: ours), what a row is a multiple of, whether `encode` writes it."""

    name: str
    ggml_type: int
    block: int
    encodes: bool

    @property
    def tiled(self) -> bool:
        """Whether rows are stored sixteen to a panel."""
        return self.ggml_type < 0


@cache
def formats() -> dict[str, Format]:
    """All formats of this build by name."""
    names = [ffi.string(lib.rondel_format_name(i)).decode() for i in range(lib.rondel_format_count())]
    return {
        n: Format(
            n,
            lib.rondel_format_ggml_type(n.encode()),
            lib.rondel_format_block(n.encode()),
            bool(lib.rondel_format_encodes(n.encode())),
        )
        for n in names
    }


def format_bytes(name: str, rows: int, cols: int) -> int:
    """Bytes of a packed (rows, cols) matrix; NativeError where the columns do not fit the format's block."""
    return int(check(lib.rondel_format_bytes(name.encode(), rows, cols)))


def encode(name: str, weights: Floats, importance: Floats | None = None, *, threads: int = 1) -> Bytes:
    """Round (rows, cols) weights onto a format; `importance` (cols,) weighs each column's squared error."""
    weights = _matrix(weights, "weights")
    rows, cols = weights.shape
    packed = np.empty(format_bytes(name, rows, cols), np.uint8)
    column_weights = ffi.NULL
    if importance is not None:
        importance = _importance(importance, cols)
        column_weights = _pointer("float *", importance)
    check(
        lib.rondel_encode(
            name.encode(), _pointer("float *", weights), column_weights, rows, cols, threads, _pointer("void *", packed)
        )
    )
    return packed


def feeds_back(name: str) -> bool:
    """Whether `encode_feedback` writes this format."""
    return bool(lib.rondel_format_feeds_back(name.encode()))


def encode_feedback(name: str, weights: Floats, importance: Floats | None, upper: Floats) -> tuple[Bytes, Floats]:
    """Round one block of columns, (rows, block), in turn, with error feedback (GPTQ, Frantar et al. 2023; LDLQ).

    `upper` (block, block) is U of inverse second moment = U^T U; scales are searched first, with `importance` (block,).
    Returns the packed block and the errors (rows, block) = (weight - decoded) / U_jj of each column when it was
    rounded: columns behind the block take their weights less errors @ U.
    """
    weights = _matrix(weights, "weights")
    rows, block = weights.shape
    packed = np.empty(format_bytes(name, rows, block), np.uint8)
    upper = np.ascontiguousarray(upper, np.float32)
    if upper.shape != (block, block):
        raise NativeError(f"upper has shape {upper.shape}, expected ({block}, {block}): the block of the weights")
    column_weights = ffi.NULL
    if importance is not None:
        importance = _importance(importance, block)
        column_weights = _pointer("float *", importance)
    errors = np.empty((rows, block), np.float32)
    check(
        lib.rondel_encode_feedback(
            name.encode(),
            _pointer("float *", weights),
            column_weights,
            _pointer("float *", upper),
            rows,
            block,
            _pointer("void *", packed),
            _pointer("float *", errors),
        )
    )
    return packed, errors


def polish(name: str, packed: Bytes, gradient: Floats, moments: Floats) -> Bytes:
    """One sweep of coordinate descent over a rounded block of columns, and a new fit of its scales (QuantEase).

    With W the weights, Q the decoded ones and H the second moment (cols, cols) of the inputs, `gradient` (rows, block)
    holds the block's columns of (W - Q) H and `moments` (block, block) is H among them. Returns new packed bytes of the
    block, with which tr((W - Q) H (W - Q)^T) is not larger.
    """
    gradient = _matrix(gradient, "gradient")
    rows, block = gradient.shape
    packed = _checked(name, packed, rows, block).copy()
    moments = np.ascontiguousarray(moments, np.float32)
    if moments.shape != (block, block):
        raise NativeError(f"moments have shape {moments.shape}, expected ({block}, {block}): the block of the gradient")
    check(
        lib.rondel_polish(
            name.encode(),
            _pointer("float *", gradient),
            _pointer("float *", moments),
            rows,
            block,
            _pointer("void *", packed),
        )
    )
    return packed


def decode(name: str, packed: Bytes, rows: int, cols: int) -> Floats:
    """Packed bytes back to (rows, cols) float32, bit for bit as the runtime and ggml's reference see them."""
    packed = _checked(name, packed, rows, cols)
    weights = np.empty((rows, cols), np.float32)
    check(lib.rondel_decode(name.encode(), _pointer("void *", packed), rows, cols, _pointer("float *", weights)))
    return weights


def matmul(name: str, packed: Bytes, rows: int, cols: int, inputs: Floats, *, threads: int = 1) -> Floats:
    """(n, cols) inputs times the packed (rows, cols) matrix transposed: (n, rows), with the runtime's own kernels."""
    packed = _checked(name, packed, rows, cols)
    inputs = _matrix(inputs, "inputs")
    if inputs.shape[1] != cols:
        raise NativeError(f"inputs have {inputs.shape[1]} columns, the weights have {cols}")
    outputs = np.empty((inputs.shape[0], rows), np.float32)
    check(
        lib.rondel_matmul(
            name.encode(),
            _pointer("void *", packed),
            rows,
            cols,
            _pointer("float *", inputs),
            inputs.shape[0],
            threads,
            _pointer("float *", outputs),
        )
    )
    return outputs


def _pointer(kind: str, array: NDArray[np.generic]) -> object:
    return ffi.cast(kind, array.ctypes.data)


def _matrix(array: Floats, what: str) -> Floats:
    array = np.ascontiguousarray(array, np.float32)
    if array.ndim != 2:
        raise NativeError(f"{what} must be a matrix, got shape {array.shape}")
    return array


def _importance(importance: Floats, cols: int) -> Floats:
    importance = np.ascontiguousarray(importance, np.float32)
    if importance.shape != (cols,):
        raise NativeError(f"importance has shape {importance.shape}, expected ({cols},): one value per column")
    return importance


def _checked(name: str, packed: Bytes, rows: int, cols: int) -> Bytes:
    packed = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    expected = format_bytes(name, rows, cols)
    if packed.size != expected:
        raise NativeError(f"a ({rows}, {cols}) matrix of {name} has {expected} bytes, got {packed.size}")
    return packed
