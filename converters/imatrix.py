"""llama.cpp's importance matrix: sums of squared inputs of every matrix, as a GGUF file; its older .dat is read too.

Both are other people's files: every length is checked, and NaN, infinite or negative sums are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rondel.converters.errors import RondelError
from rondel.converters.gguf_keys import ALIGNMENT, MAGIC, General, Rondel
from rondel.converters.gguf_keys import Imatrix as Keys
from rondel.converters.gguf_reader import F32, GgufFile
from rondel.converters.gguf_writer import MAX_NAME_BYTES, Entry, write_gguf

MAX_LEGACY_BYTES = 1 << 32
MAX_LEGACY_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Imatrix:
    """What one file says. `values[name]` is each input channel's mean square, (cols,) F32, (experts, cols) for MoE."""

    values: dict[str, np.ndarray]
    counts: dict[str, float]  # tokens seen; of a .dat file, chunks
    chunk_count: int | None = None
    chunk_size: int | None = None  # tokens
    datasets: list[str] = field(default_factory=list)
    basis: str | None = None  # `rotation.basis_hash` of the model's rotations, None where it had none


class _Malformed(ValueError):
    """The bytes are no imatrix file."""


def _checked(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all() or (values < 0).any():
        raise RondelError(f"{path}: {name} holds values that are no mean squares (NaN, infinite or negative)")
    return values


def _number(path: Path, keys: Mapping[str, Any], key: str) -> int | None:
    value = keys.get(key)
    if value is not None and not isinstance(value, np.integer):
        raise RondelError(f"{path}: key {key} is not an integer")
    return None if value is None else int(value)


def _read_gguf(path: Path) -> Imatrix:
    file = GgufFile(path)
    kind = file.keys.get(General.TYPE)
    if kind != Keys.TYPE:
        raise RondelError(f"{path}: its {General.TYPE} is {kind!r}, expected 'imatrix'; give a file of llama-imatrix")
    values: dict[str, np.ndarray] = {}
    counts: dict[str, float] = {}
    for stored in file.tensors:
        name = stored.removesuffix(Keys.SUMS)
        if name == stored:
            continue
        if name + Keys.COUNTS not in file.tensors:
            raise RondelError(f"{path}: {stored} has no {name}{Keys.COUNTS} beside it; the file is damaged")
        sums = _checked(path, stored, file.floats(stored))
        seen = _checked(path, name + Keys.COUNTS, file.floats(name + Keys.COUNTS)).reshape(-1, 1)
        if sums.ndim not in (1, 2) or sums.size == 0 or len(seen) != sums.size // sums.shape[-1]:
            raise RondelError(f"{path}: {stored} of shape {list(sums.shape)} does not match {len(seen)} counts")
        # Experts that saw no token weigh every channel alike.
        means = np.where(seen > 0, sums.reshape(len(seen), -1) / np.maximum(seen, 1), 1.0).astype(np.float32)
        values[name] = means[0] if len(seen) == 1 else means
        counts[name] = float(seen.max())
    if not values:
        raise RondelError(f"{path}: holds no {Keys.SUMS} tensors; run llama-imatrix or rondel calibrate again")
    datasets, basis = file.keys.get(Keys.DATASETS), file.keys.get(Rondel.BASIS)
    if basis is not None and not isinstance(basis, str):
        raise RondelError(f"{path}: key {Rondel.BASIS} is not a text")
    return Imatrix(
        values,
        counts,
        _number(path, file.keys, Keys.CHUNK_COUNT),
        _number(path, file.keys, Keys.CHUNK_SIZE),
        list(datasets) if isinstance(datasets, list) else [],
        basis,
    )


class _Bytes:
    """The .dat file from front to back."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        if not 0 <= size <= len(self.data) - self.at:
            raise _Malformed(f"ends inside a field of {size} bytes at byte {self.at}")
        self.at += size
        return self.data[self.at - size : self.at]

    def integer(self) -> int:
        value: int = struct.unpack("<i", self.take(4))[0]
        return value


def _read_legacy(path: Path) -> Imatrix:
    """Entries of name, number of calls, and sums that are means times the calls; then chunks and the data's name."""
    if path.stat().st_size > MAX_LEGACY_BYTES:
        raise _Malformed(f"larger than {MAX_LEGACY_BYTES} bytes")
    data = _Bytes(path.read_bytes())
    entries = data.integer()
    if not 0 < entries <= MAX_LEGACY_ENTRIES:
        raise _Malformed(f"announces {entries} entries")
    values: dict[str, np.ndarray] = {}
    counts: dict[str, float] = {}
    for _ in range(entries):
        name = data.take(data.integer()).decode("utf-8")
        calls, size = data.integer(), data.integer()
        if size <= 0 or name in values:
            raise _Malformed(f"{name!r} occurs twice or has {size} values")
        sums = np.frombuffer(data.take(4 * size), "<f4")
        values[name] = _checked(path, name, sums / np.float32(max(calls, 1)))
        counts[name] = float(max(calls, 0))
    chunks, datasets = None, []
    if data.at < len(data.data):
        chunks = data.integer()
        datasets = [data.take(data.integer()).decode("utf-8")] if data.at < len(data.data) else []
    return Imatrix(values, counts, chunks, None, datasets)


def read_imatrix(path: Path) -> Imatrix:
    """The mean squares in an imatrix file of either kind, under canonical tensor names (`blk.0.attn_q.weight`)."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        return _read_gguf(path) if is_gguf else _read_legacy(path)
    except (OSError, ValueError) as error:
        raise RondelError(
            f"{path}: cannot be read as an imatrix ({getattr(error, 'strerror', None) or error})"
        ) from error


def write_imatrix(
    path: Path,
    sums: Mapping[str, tuple[np.ndarray, float]],
    *,
    datasets: Sequence[str],
    chunk_size: int,
    chunk_count: int,
    basis: str | None = None,
) -> None:
    """Write llama.cpp's form: per tensor name the sums of squares, (cols,), and the number of tokens they ran over.

    Of `datasets` only the last part of each path is kept. `basis`: hash of the model's rotations, where it has any. The
    file appears whole or not at all.
    """
    entries: list[Entry] = []
    arrays: list[np.ndarray] = []
    for name in sorted(sums):
        squares, count = sums[name]
        for suffix, array in ((Keys.SUMS, squares), (Keys.COUNTS, np.array([count]))):
            stored = name + suffix
            if len(stored.encode()) > MAX_NAME_BYTES:
                raise RondelError(f"{path}: {stored} is longer than a tensor's name may be ({MAX_NAME_BYTES} bytes)")
            floats = np.ascontiguousarray(_checked(path, stored, np.asarray(array, np.float64)), dtype="<f4")
            assert floats.ndim == 1
            entries.append(Entry(stored, (floats.size, 1), F32, floats.nbytes))
            arrays.append(floats)
    keys = {
        General.TYPE: Keys.TYPE,
        Keys.DATASETS: [Path(dataset).name for dataset in datasets],
        Keys.CHUNK_COUNT: chunk_count,
        Keys.CHUNK_SIZE: chunk_size,
        **({Rondel.BASIS: basis} if basis else {}),
    }
    partial = path.with_name(path.name + ".partial")
    try:
        write_gguf(partial, keys, entries, lambda index: arrays[index].view(np.uint8), alignment=ALIGNMENT)
        partial.replace(path)
    except OSError as error:
        raise RondelError(f"{path}: cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
