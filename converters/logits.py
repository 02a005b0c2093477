"""Reads and writes llama.cpp's file of a model's log-probabilities over a text (`--kl-divergence-base`).

"_logits_"  u32 context  i32 vocabulary  i32 windows  i32 tokens[windows][context]
then for each scored position of each window (positions context/2 .. context-2), little-endian:
f32 scale  f32 lowest  u16 code[vocabulary, rounded up to even]      log p = scale * code + lowest
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rondel.converters.errors import RondelError

MAGIC = b"_logits_"
HEADER = struct.Struct("<8sIii")
RANGE = np.float32(16)  # nats below the likeliest token that the 16 bits cover
STEPS = np.float32(65535)
ROUNDING = 1e-2  # nats: float32 may put a certain token's log-probability this far above 0
MAX_CONTEXT = 1 << 24  # no model comes near; keeps every product below 2^63


def scored_rows(context: int) -> int:
    """How many positions of a window are scored: the second half without the last, which has no successor."""
    return context - 1 - context // 2


def row_bytes(vocabulary: int) -> int:
    """The bytes of one position: scale, lowest, and an even number of 16-bit codes."""
    return 8 + 2 * (vocabulary + vocabulary % 2)


def file_bytes(windows: int, context: int, vocabulary: int) -> int:
    """The size of the whole file."""
    return HEADER.size + windows * (4 * context + scored_rows(context) * row_bytes(vocabulary))


def encode_rows(logits: NDArray[np.float32]) -> bytes:
    """Logits (rows, vocabulary) as the file keeps them; in float32, as llama.cpp rounds."""
    rows, vocabulary = logits.shape
    highest = logits.max(axis=1, keepdims=True)
    lowest = np.maximum(logits.min(axis=1, keepdims=True), highest - RANGE)
    total = np.exp(logits.astype(np.float64) - highest).sum(axis=1, keepdims=True)
    log_total = np.log(total).astype(np.float32)
    scale = (highest - lowest) / STEPS
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)

    packed = np.zeros((rows, row_bytes(vocabulary)), np.uint8)
    packed[:, 0:4] = scale.astype("<f4").view(np.uint8)
    packed[:, 4:8] = (lowest - highest - log_total).astype("<f4").view(np.uint8)
    codes = np.rint(inverse * (np.maximum(logits, lowest) - lowest)).astype("<u2")
    packed[:, 8 : 8 + 2 * vocabulary] = codes.view(np.uint8)
    return packed.tobytes()


def decode_rows(packed: NDArray[np.uint8], vocabulary: int) -> NDArray[np.float32]:
    """Log-probabilities (rows, vocabulary) of packed rows (rows, row_bytes)."""
    head = np.ascontiguousarray(packed[:, :8]).view("<f4")
    codes = np.ascontiguousarray(packed[:, 8 : 8 + 2 * vocabulary]).view("<u2")
    return head[:, 0:1] * codes.astype(np.float32) + head[:, 1:2]


class LogitsWriter:
    """Writes windows in their order; the file appears under its name when the last one is in. A context manager."""

    def __init__(self, path: Path, tokens: NDArray[np.int32], vocabulary: int) -> None:
        if path.is_dir():
            raise RondelError(f"{path}: cannot be written: it is a folder")
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._windows, self._context = tokens.shape
        self._vocabulary = vocabulary
        self._written = 0
        try:
            self._file: BinaryIO = open(self._partial, "wb")  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise RondelError(f"{path}: cannot be written: {error.strerror}") from error
        self._file.write(HEADER.pack(MAGIC, self._context, vocabulary, self._windows))
        self._file.write(np.ascontiguousarray(tokens, "<i4").tobytes())

    def write(self, logits: NDArray[np.float32]) -> None:
        """Scored positions, (any number of rows, vocabulary)."""
        assert logits.shape[1] == self._vocabulary
        self._file.write(encode_rows(logits))
        self._written += len(logits)

    def __enter__(self) -> LogitsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            assert self._written == self._windows * scored_rows(self._context)
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)


class LogitsFile:
    """A file of log-probabilities, mapped: `tokens` (windows, context), and the rows of one window at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                head = file.read(HEADER.size)
        except OSError as error:
            raise RondelError(f"{path}: cannot be read: {error.strerror}") from error
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise RondelError(f"{path}: not a file of logits; write one with rondel eval --save-base")
        _, self.context, self.vocabulary, self.windows = HEADER.unpack(head)
        if not (3 <= self.context <= MAX_CONTEXT and self.vocabulary > 0 and self.windows > 0):
            raise RondelError(
                f"{path}: damaged header: context {self.context}, vocabulary {self.vocabulary}, windows {self.windows}"
            )
        self._row = row_bytes(self.vocabulary)
        tokens_end = HEADER.size + 4 * self.context * self.windows
        expected = file_bytes(self.windows, self.context, self.vocabulary)
        if size != expected:
            raise RondelError(f"{path}: {size} bytes, expected {expected}: it was cut or not finished; write it again")
        self._data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        tokens: Any = np.array(self._data[HEADER.size : tokens_end]).view("<i4")
        self.tokens: NDArray[np.int32] = tokens.reshape(self.windows, self.context)
        if self.tokens.min() < 0 or self.tokens.max() >= self.vocabulary:
            raise RondelError(f"{path}: damaged: it names tokens outside its vocabulary of {self.vocabulary}")
        self._rows = self._data[tokens_end:].reshape(-1, self._row)

    def rows(self, window: int, first: int = 0, count: int | None = None) -> NDArray[np.float32]:
        """Log-probabilities (count, vocabulary) of a window's scored positions from `first` on."""
        per_window = scored_rows(self.context)
        start = window * per_window + first
        stop = (window + 1) * per_window if count is None else start + count
        packed = self._rows[start:stop]
        scale, lowest = np.ascontiguousarray(packed[:, :8]).view("<f4").astype(np.float64).T
        # The likeliest token has code 65535 and a probability of at most 1. Not-a-number fails the comparisons too.
        if not (np.all(scale >= 0) and np.all(scale * STEPS + lowest < ROUNDING) and np.all(np.isfinite(lowest))):
            raise RondelError(f"{self.path}: damaged: window {window} holds no log-probabilities; write the file again")
        return decode_rows(packed, self.vocabulary)
