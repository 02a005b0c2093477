"""A GGUF file as Python sees it: keys as values, tensors as descriptions, all read in place from the map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fsencode
from struct import unpack_from
from typing import TYPE_CHECKING, Any

import numpy as np

from rondel.native.library import check, check_handle, ffi, last_error, lib

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray  # slow to import, and only annotations need it


_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_TYPE_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")


@dataclass(frozen=True)
class Tensor:
    """One tensor. `shape` is (rows, cols) order, the reverse of GGUF's ne; `offset` counts in file `shard`."""

    index: int
    name: str
    format: str
    shape: tuple[int, ...]
    bytes: int
    offset: int
    shard: int


class Keys(Mapping[str, Any]):
    """The keys of a file by name; a value is decoded when it is asked for.

    Numbers and bools come as Python's own, strings as `str` (bytes that are not UTF-8 are kept as surrogates), arrays
    of strings as lists, arrays of numbers as numpy arrays.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        length = ffi.new("uint64_t *")
        self._index: dict[str, int] = {}
        for i in range(lib.rondel_file_key_count(file.handle)):
            name = lib.rondel_file_key_name(file.handle, i, length)
            self._index[_text(bytes(ffi.buffer(name, length[0])))] = i

    def __getitem__(self, name: str) -> Any:
        index = self._index[name]
        handle = self._file.handle
        length = ffi.new("uint64_t *")
        data = lib.rondel_file_key_data(handle, index, length)
        raw = bytes(ffi.buffer(data, length[0]))
        element = lib.rondel_file_key_element_type(handle, index)
        if lib.rondel_file_key_type(handle, index) != _ARRAY:
            return _text(raw[8:]) if element == _STRING else np.frombuffer(raw, _NUMBERS[element])[0].item()
        if element == _STRING:
            return _strings(raw, lib.rondel_file_key_count_of(handle, index))
        return np.frombuffer(raw, _NUMBERS[element])

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def type(self, name: str) -> str:
        """The stored type of a key: "u32", "string", "array of f32" and so on."""
        index = self._index[name]
        element = _TYPE_NAMES[lib.rondel_file_key_element_type(self._file.handle, index)]
        return f"array of {element}" if lib.rondel_file_key_type(self._file.handle, index) == _ARRAY else element


class File:
    """A GGUF file, or all shards of a split one, parsed and mapped.

    Raises `NativeError` for a damaged file, and for one that needs features this rondel does not have.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._attach(ffi.gc(check_handle(lib.rondel_file_open(fsencode(path))), lib.rondel_file_close), None)

    @classmethod
    def borrow(cls, handle: Any, owner: object) -> File:
        """The file behind a C handle that `owner` will close."""
        file = cls.__new__(cls)
        file._attach(handle, owner)
        return file

    def _attach(self, handle: Any, owner: object) -> None:
        self._handle, self._owner = handle, owner
        self.keys = Keys(self)
        self.tensors = [self._tensor(i) for i in range(lib.rondel_file_tensor_count(self.handle))]

    @property
    def handle(self) -> Any:
        """The C handle; raises `ValueError` after `close`."""
        if self._handle is None:
            raise ValueError("the file is closed")
        return self._handle

    @property
    def version(self) -> int:
        """The GGUF version, 2 or 3."""
        return int(lib.rondel_file_version(self.handle))

    @property
    def alignment(self) -> int:
        """The alignment of tensor data in bytes."""
        return int(lib.rondel_file_alignment(self.handle))

    @property
    def shards(self) -> list[str]:
        """The paths of the files that belong together, one if it is not split."""
        paths = (lib.rondel_file_shard_path(self.handle, i) for i in range(lib.rondel_file_shard_count(self.handle)))
        return [_text(ffi.string(path)) for path in paths]

    def data(self, tensor: Tensor) -> NDArray[np.uint8]:
        """The packed bytes of a tensor, (bytes,), as a view of the map: valid until the file is closed."""
        size, offset = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        data = lib.rondel_file_tensor_data(self.handle, tensor.index, size, offset)
        return np.frombuffer(ffi.buffer(data, size[0]), np.uint8)

    def damage(self, tensor: Tensor) -> str | None:
        """A sentence naming the first block whose scale is not finite, or None where all are.

        Raises `NativeError` for a format this rondel cannot decode.
        """
        return last_error() if check(lib.rondel_file_tensor_check(self.handle, tensor.index)) == 1 else None

    def close(self) -> None:
        """Unmaps the file. What `data` returned must not be used any more."""
        if self._handle is not None and self._owner is None:
            ffi.release(self._handle)
        self._handle = self._owner = None

    def __enter__(self) -> File:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensor(self, index: int) -> Tensor:
        ne, size, offset = ffi.new("uint64_t[4]"), ffi.new("uint64_t *"), ffi.new("uint64_t *")
        dimensions = lib.rondel_file_tensor_shape(self.handle, index, ne)
        lib.rondel_file_tensor_data(self.handle, index, size, offset)
        return Tensor(
            index=index,
            name=_text(ffi.string(lib.rondel_file_tensor_name(self.handle, index))),
            format=ffi.string(lib.rondel_file_tensor_format(self.handle, index)).decode(),
            shape=tuple(ne[dimensions - 1 - i] for i in range(dimensions)),
            bytes=size[0],
            offset=offset[0],
            shard=lib.rondel_file_tensor_shard(self.handle, index),
        )


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _strings(raw: bytes, count: int) -> list[str]:
    """Decodes `count` strings laid out as u64 length, bytes."""
    strings, at = [], 0
    for _ in range(count):
        (length,) = unpack_from("<Q", raw, at)
        at += 8 + length
        strings.append(raw[at - length : at].decode("utf-8", "surrogateescape"))
    return strings
