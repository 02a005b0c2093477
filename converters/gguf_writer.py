"""Writes GGUF v3: the header in memory, the tensors streamed one at a time, the same bytes for the same input.

A key's value says its type: str, bool, int (u32), float (f32), list of str, list of int (i32), list of float (f32), or
a numpy scalar or one-dimensional array, whose dtype is the type. Everything is little-endian.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rondel.converters.gguf_keys import MAGIC, VERSION, Rondel

# GGUF's numbers of the value types.
BOOL, STRING, ARRAY = 7, 8, 9
NUMPY_TYPES: dict[np.dtype[Any], int] = {
    np.dtype("<u1"): 0,
    np.dtype("<i1"): 1,
    np.dtype("<u2"): 2,
    np.dtype("<i2"): 3,
    np.dtype("<u4"): 4,
    np.dtype("<i4"): 5,
    np.dtype("<f4"): 6,
    np.dtype("?"): BOOL,
    np.dtype("<u8"): 10,
    np.dtype("<i8"): 11,
    np.dtype("<f8"): 12,
}
MAX_NAME_BYTES = 63  # of a tensor: ggml's limit, without its closing zero
HASH_DIGITS = 64  # of one SHA-256 in hexadecimal
SHORT_HASH_DIGITS = 16  # 64 bits tell damage; the file of a small quantized model should not grow by more
FLOAT_TYPES = (0, 1, 30)  # F32, F16, BF16

Value = Any  # see the first lines of this file


@dataclass(frozen=True)
class Entry:
    """One tensor in the file: `ne` has the contiguous dimension first, `type` is ggml's number."""

    name: str
    ne: tuple[int, ...]
    type: int
    bytes: int


def padded(size: int, alignment: int) -> int:
    """`size` up to the next multiple of `alignment`."""
    return -(-size // alignment) * alignment


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _array(values: list[Any] | np.ndarray) -> bytes:
    if isinstance(values, list) and (not values or isinstance(values[0], str)):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(_string(text) for text in values)
    if isinstance(values, list):
        values = np.array(values, dtype="<f4" if isinstance(values[0], float) else "<i4")
    assert values.ndim == 1
    data = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return struct.pack("<IQ", NUMPY_TYPES[data.dtype], data.size) + data.tobytes()


def encode(value: Value) -> bytes:
    """A key's value with its type in front."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list | np.ndarray):
        return struct.pack("<I", ARRAY) + _array(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        value = np.uint32(value)
    elif isinstance(value, float):
        value = np.float32(value)
    return struct.pack("<I", NUMPY_TYPES[value.dtype]) + value.tobytes()


def header(keys: Mapping[str, Value], entries: Sequence[Entry], alignment: int) -> tuple[bytes, int | None]:
    """Everything before the tensors' bytes, and where in it the hashes of the tensors stand, if they are asked for."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(keys))]
    size = sum(len(part) for part in parts)
    hashes_at = None
    for key, value in keys.items():
        part = _string(key) + encode(value)
        size += len(part)
        parts.append(part)
        if key == Rondel.TENSOR_SHA256:
            hashes_at = size - len(value)
    offset = 0
    for entry in entries:
        assert len(entry.name.encode()) <= MAX_NAME_BYTES
        shape = struct.pack(f"<I{len(entry.ne)}Q", len(entry.ne), *entry.ne)
        parts.append(_string(entry.name) + shape + struct.pack("<IQ", entry.type, offset))
        offset += padded(entry.bytes, alignment)
    whole = b"".join(parts)
    return whole.ljust(padded(len(whole), alignment), b"\0"), hashes_at


def file_size(keys: Mapping[str, Value], entries: Sequence[Entry], alignment: int) -> int:
    """The exact number of bytes that `write_gguf` writes."""
    return len(header(keys, entries, alignment)[0]) + sum(padded(entry.bytes, alignment) for entry in entries)


def hash_digits(keys: Mapping[str, Value], entries: Sequence[Entry]) -> int:
    """How much of each tensor's hash a file keeps: all of it where something else refers to it.

    Float files are what others are made from, and copies of layers are bound to the hashes of their base.
    """
    packed = any(entry.type not in FLOAT_TYPES for entry in entries)
    return SHORT_HASH_DIGITS if packed and f"{Rondel.REPLICATION}base.sha256" not in keys else HASH_DIGITS


def hashes_placeholder(entries: Sequence[Entry], digits: int) -> str:
    """A string as long as the hashes of the tensors, which `write_gguf` replaces."""
    return "0" * (digits * len(entries))


def write_gguf(
    path: Path,
    keys: Mapping[str, Value],
    entries: Sequence[Entry],
    read: Callable[[int], np.ndarray],
    *,
    alignment: int,
    first: int = 0,
) -> None:
    """Write a whole file and bring it to the disk; the caller gives it its final name.

    `read(first + i)` returns the uint8 bytes of the i-th tensor when its turn comes. Where the keys hold
    `rondel.tensor.sha256`, its digits are filled in once all tensors have passed.
    """
    start, hashes_at = header(keys, entries, alignment)
    digests = []
    digits = len(keys.get(Rondel.TENSOR_SHA256, "")) // max(len(entries), 1)
    with path.open("wb") as file:
        file.write(start)
        for index, entry in enumerate(entries):
            data = np.ascontiguousarray(read(first + index)).reshape(-1).view(np.uint8).data
            assert len(data) == entry.bytes
            if hashes_at is not None:
                digests.append(hashlib.sha256(data).hexdigest()[:digits])
            file.write(data)
            file.write(bytes(padded(entry.bytes, alignment) - entry.bytes))
        if hashes_at is not None:
            file.seek(hashes_at)
            file.write("".join(digests).encode())
        file.flush()
        os.fsync(file.fileno())
