"""Reads the keys and float tensors of a GGUF file without trusting it: every length is checked before it is used."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rondel.converters.errors import RondelError
from rondel.converters.gguf_keys import ALIGNMENT, MAGIC, VERSION, General
from rondel.converters.gguf_writer import ARRAY, BOOL, NUMPY_TYPES, STRING, padded

_DTYPES: dict[int, np.dtype[Any]] = {number: dtype for dtype, number in NUMPY_TYPES.items()}
_SMALLEST_KEY = 13  # bytes: length of the name, type, one byte of value
_SMALLEST_TENSOR = 24  # bytes: length of the name, number of dimensions, type, offset
_MAX_DIMENSIONS = 4
F32 = 0  # ggml's number


class _Malformed(ValueError):
    """The bytes are no GGUF file."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `ne` has the contiguous dimension first, `offset` counts from the start of the file."""

    ne: tuple[int, ...]
    type: int
    offset: int


class _Cursor:
    """A place in the file; every step checks that the file goes on that far."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise _Malformed(f"ends inside a field of {size} bytes at byte {self.at}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> int:
        value: int = struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]
        return value

    def count(self, smallest: int) -> int:
        """A number of things of which each needs at least `smallest` bytes."""
        count = self.number("Q")
        if count > (len(self.data) - self.at) // smallest:
            raise _Malformed(f"announces {count} entries at byte {self.at}, more than it can hold")
        return count

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        return self.scalars(kind, 1)[0]

    def scalars(self, kind: int, count: int) -> np.ndarray:
        if kind not in _DTYPES:
            raise _Malformed(f"value type {kind} at byte {self.at}")
        raw = self.take(_DTYPES[kind].itemsize * count)
        return np.frombuffer(raw, np.uint8) != 0 if kind == BOOL else np.frombuffer(raw, _DTYPES[kind])

    def array(self) -> Any:
        kind = self.number("I")
        if kind == STRING:
            return [self.text() for _ in range(self.count(8))]
        return self.scalars(kind, self.count(1))


class GgufFile:
    """The keys and tensors of one file. Numbers come as numpy scalars, arrays of numbers as numpy arrays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read(_Cursor(self._map))
        except (OSError, ValueError) as error:
            raise RondelError(f"{path}: cannot be read as a GGUF file ({error})") from error

    def _read(self, cursor: _Cursor) -> None:
        if cursor.take(4) != MAGIC:
            raise _Malformed("it does not begin with GGUF")
        version = cursor.number("I")
        if version not in (2, VERSION):
            raise _Malformed(f"version {version}, expected {VERSION}")
        tensors = cursor.count(_SMALLEST_TENSOR)
        self.keys: dict[str, Any] = {}
        for _ in range(cursor.count(_SMALLEST_KEY)):
            name = cursor.text()
            if name in self.keys:
                raise _Malformed(f"key {name} occurs twice")
            self.keys[name] = cursor.value()
        entries: dict[str, Stored] = {}
        for _ in range(tensors):
            name = cursor.text()
            dimensions = cursor.number("I")
            if dimensions > _MAX_DIMENSIONS or name in entries:
                raise _Malformed(f"tensor {name} has {dimensions} dimensions or occurs twice")
            ne = tuple(cursor.number("Q") for _ in range(dimensions))
            entries[name] = Stored(ne, cursor.number("I"), cursor.number("Q"))
        alignment = self.keys.get(General.ALIGNMENT, ALIGNMENT)
        if not isinstance(alignment, int | np.integer) or alignment <= 0:
            raise _Malformed(f"alignment {alignment}")
        start = padded(cursor.at, int(alignment))
        self.tensors = {name: Stored(entry.ne, entry.type, start + entry.offset) for name, entry in entries.items()}

    def floats(self, name: str) -> np.ndarray:
        """A copy of an F32 tensor, shaped (outer, ..., inner)."""
        entry = self.tensors[name]
        if entry.type != F32:
            raise RondelError(f"{self.path}: tensor {name} has ggml type {entry.type}, expected F32")
        count = 1
        for size in entry.ne:
            count *= size
        if entry.offset + 4 * count > len(self._map):
            raise RondelError(f"{self.path}: tensor {name} ends behind the end of the file; it is cut off")
        return np.frombuffer(self._map, "<f4", count, entry.offset).reshape(entry.ne[::-1]).copy()
