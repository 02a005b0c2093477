"""One model in one GGUF file or in several: what each holds, and how all of them appear at once.

Files are written beside their place under a temporary name and renamed when all of them are whole, the first of a
split last: whoever sees the first file has all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rondel.converters.errors import RondelError
from rondel.converters.gguf_keys import General, Rondel, Split
from rondel.converters.gguf_reader import GgufFile
from rondel.converters.gguf_writer import Entry, Value, file_size, hash_digits, hashes_placeholder, padded, write_gguf

MOST_PARTS = 65535  # split.count is a u16
SHARED_KEYS = (General.ALIGNMENT, Rondel.EXPORT_SHA256)  # in every part; all other metadata is in the first


@dataclass(frozen=True)
class GgufPart:
    """One output file: a run of the model's tensors."""

    path: Path
    keys: dict[str, Value]
    first: int  # index of its first tensor in the model
    entries: list[Entry]
    alignment: int

    def size(self) -> int:
        """The exact number of bytes of the file."""
        return file_size(self.keys, self.entries, self.alignment)

    def is_made(self) -> bool:
        """Whether the file on the disk has this size and was made from the same inputs and settings."""
        try:
            keys = GgufFile(self.path).keys
        except RondelError:
            return False
        same = keys.get(Rondel.EXPORT_SHA256) == self.keys[Rondel.EXPORT_SHA256]
        return same and self.path.stat().st_size == self.size()


def _runs(entries: Sequence[Entry], most: int | None, alignment: int) -> list[list[Entry]]:
    """Runs of tensors of at most `most` bytes; a larger tensor has a file of its own."""
    runs: list[list[Entry]] = [[]]
    size = 0
    for tensor in entries:
        step = padded(tensor.bytes, alignment)
        if most is not None and runs[-1] and size + step > most:
            runs.append([])
            size = 0
        runs[-1].append(tensor)
        size += step
    return runs


def gguf_parts(
    path: Path, keys: Mapping[str, Value], entries: Sequence[Entry], most: int | None, alignment: int
) -> list[GgufPart]:
    """The file `path`, or `NAME-00001-of-0000N.gguf` of at most `most` bytes of tensors each, as llama.cpp names them.

    Every part holds the hashes of its own tensors.
    """
    runs = _runs(entries, most, alignment)
    if len(runs) > MOST_PARTS:
        raise RondelError(f"--split {most}: makes {len(runs)} files, at most {MOST_PARTS} are possible")
    stem = path.name.removesuffix(".gguf")
    parts: list[GgufPart] = []
    first, digits = 0, hash_digits(keys, entries)
    for number, run in enumerate(runs):
        kept = {key: keys[key] for key in SHARED_KEYS if key in keys} if number else dict(keys)
        place = path
        if len(runs) > 1:
            place = path.with_name(f"{stem}-{number + 1:05d}-of-{len(runs):05d}.gguf")
            kept[Split.NUMBER] = np.uint16(number)
            kept[Split.COUNT] = np.uint16(len(runs))
            kept[Split.TENSORS] = np.int32(len(entries))
        kept[Rondel.TENSOR_SHA256] = hashes_placeholder(run, digits)
        parts.append(GgufPart(place, kept, first, run, alignment))
        first += len(run)
    return parts


def is_made(parts: Sequence[GgufPart], *, force: bool) -> bool:
    """Whether an earlier run with the same inputs and settings wrote all parts; refuses to replace anything else."""
    existing = [part for part in parts if part.path.exists()]
    for part in existing:
        if not part.path.is_file():
            raise RondelError(f"{part.path}: is not a file; choose another -o")
    foreign = [part for part in existing if not part.is_made()]
    if foreign and not force:
        raise RondelError(
            f"{foreign[0].path}: exists with other contents; choose another -o, or use --force to replace it"
        )
    return not foreign and len(existing) == len(parts)


def write_parts(parts: Sequence[GgufPart], read: Callable[[int], np.ndarray]) -> None:
    """Write all parts; `read(i)` gives the bytes of the model's i-th tensor. No part appears before all are whole."""
    partials = [part.path.with_name(part.path.name + ".partial") for part in parts]
    try:
        for part, partial in zip(parts, partials, strict=True):
            write_gguf(partial, part.keys, part.entries, read, first=part.first, alignment=part.alignment)
        if len(parts) > 1:
            parts[0].path.unlink(missing_ok=True)  # an old first part must not stand before new ones
        for part, partial in reversed(list(zip(parts, partials, strict=True))):
            partial.replace(part.path)
    except OSError as error:
        raise RondelError(f"{parts[0].path}: cannot be written ({error.strerror or error})") from error
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
