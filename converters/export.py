"""The last stage: a checkpoint becomes one GGUF file, or several by size, for llama.cpp or for rondel's own runtime.

Files are written beside their place under a temporary name and renamed when all of them are whole, the first of a
split last: whoever sees the first file has all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.gguf_keys import ALIGNMENT, EXTENDED_ALIGNMENT, General, Rondel, Split
from rondel.converters.gguf_reader import GgufFile
from rondel.converters.gguf_writer import Entry, Value, file_size, hashes_placeholder, padded, write_gguf
from rondel.converters.metadata import (
    describe,
    extension_version,
    file_name,
    provenance_keys,
    rotation_keys,
    standard_keys,
)
from rondel.converters.outgoing import FLOAT_TYPES, Outgoing, entry, outgoing_tensors, tensor_bytes
from rondel.converters.progress import Progress, silent
from rondel.converters.replication_keys import is_strict, replication_keys
from rondel.converters.rotation import Rotation
from rondel.converters.vocabulary import vocabulary_keys

TARGETS = ("llama.cpp", "rondel")
HADAMARD, REPLICATION = "hadamard-1", "replication-1"  # names of features (formats.md, section 1)
MOST_DIMENSIONS = 4
MOST_SHARDS = 65535  # split.count is a u16


@dataclass(frozen=True)
class ExportConfig:
    """What to make of the checkpoint; the defaults keep everything as it is."""

    type: str | None = None  # F16, F32 or BF16 for the matrices of a checkpoint that is not quantized
    split: int | None = None  # most bytes of tensors in one file
    materialize: bool = False  # serial copies become real layers
    target: str | None = None  # "llama.cpp" or "rondel"; None: what the checkpoint was made for
    name: str | None = None  # of the model, instead of the source folder's
    pre: str | None = None  # llama.cpp's name of the pre-tokenizer, where rondel does not recognise it


@dataclass(frozen=True)
class _Content:
    """Everything that decides the bytes of the output."""

    source: Checkpoint
    tensors: list[Outgoing]
    entries: list[Entry]
    keys: dict[str, Value]
    alignment: int
    encoding: str  # the type or mixture, for the file's name
    default_name: str


@dataclass(frozen=True)
class _File:
    """One output file: a run of the tensors."""

    path: Path
    keys: dict[str, Value]
    first: int
    entries: list[Entry]


def _check(source: Checkpoint, config: ExportConfig) -> None:
    if config.type is not None and config.type not in FLOAT_TYPES:
        raise RondelError(f"--type {config.type}: expected F16, F32 or BF16; other types are made by `rondel quantize`")
    if config.type is not None and source.quantized:
        raise RondelError(
            f"{source.root}: is quantized, so --type {config.type} cannot apply; export it without --type"
        )
    if config.target is not None and config.target not in TARGETS:
        raise RondelError(f"--target {config.target}: expected llama.cpp or rondel")
    if config.split is not None and config.split <= 0:
        raise RondelError(f"--split {config.split}: expected a positive number of bytes, such as 2G")


def _encoding(source: Checkpoint, config: ExportConfig, tensors: list[Outgoing]) -> str:
    """The name of the type or mixture: what the user asked of quantize, or the float type that most weights have."""
    if source.quantized:
        for stage in reversed(source.stages):
            if stage.get("name") == "quantize" and isinstance(stage.get("config", {}).get("type"), str):
                return str(stage["config"]["type"])
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.format] = sizes.get(tensor.format, 0) + int(np.prod(tensor.shape, dtype=np.int64))
    return max(sizes, key=lambda format: (sizes[format], format))


def _features(rotations: list[Rotation], tensors: list[Outgoing], replication: dict[str, Value]) -> list[str]:
    """What a reader must know beyond plain GGUF; empty where unmodified llama.cpp may run the file."""
    found = {tensor.feature for tensor in tensors if tensor.feature is not None}
    if any(rotation.online for rotation in rotations):
        found.add(HADAMARD)
    if is_strict(replication):
        found.add(REPLICATION)
    return sorted(found)


def _extension_keys(tensors: list[Outgoing], features: list[str], family: str) -> dict[str, Value]:
    keys: dict[str, Value] = {Rondel.VERSION: extension_version()}
    if not features:
        return keys
    keys |= {Rondel.BASE_ARCHITECTURE: family, Rondel.REQUIRES: features}
    extended = [tensor for tensor in tensors if tensor.feature is not None]
    if extended:
        shapes = [[*reversed(tensor.shape), *[1] * (MOST_DIMENSIONS - len(tensor.shape))] for tensor in extended]
        keys[Rondel.TENSOR_NAME] = [tensor.name for tensor in extended]
        keys[Rondel.TENSOR_FORMAT] = [tensor.format for tensor in extended]
        keys[Rondel.TENSOR_SHAPE] = np.array(shapes, np.uint64).reshape(-1)
    return keys


def _content(source: Checkpoint, config: ExportConfig) -> _Content:
    """Decide and check everything, without reading a weight."""
    _check(source, config)
    numbers = source.numbers
    tensors = outgoing_tensors(source, config.type)
    rotations = source.rotations
    replication = replication_keys(source.manifest.get("replication") or {})
    if config.materialize:
        from rondel.converters.materialize import materialize

        expanded = materialize(source, tensors)
        tensors, rotations = expanded.tensors, expanded.rotations(rotations)
        numbers, replication = replace(numbers, layers=len(expanded.path)), {}
    features = _features(rotations, tensors, replication)
    target = config.target or source.manifest.get("target") or ("rondel" if features else "llama.cpp")
    if features and target == "llama.cpp":
        raise RondelError(
            f"{source.root}: needs {', '.join(features)}, which llama.cpp does not know; use --target rondel"
        )
    family = source.family.name
    encoding = _encoding(source, config, tensors)
    parameters = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors)
    described = describe(source, config.name, parameters)
    keys = standard_keys(source, numbers, described, encoding, Rondel.ARCHITECTURE if features else family)
    alignment = ALIGNMENT
    if any(tensor.feature for tensor in tensors):
        alignment = EXTENDED_ALIGNMENT
        keys[General.ALIGNMENT] = alignment
    keys |= vocabulary_keys(source.side_files(), numbers.vocabulary, family=family, pre=config.pre)
    keys |= _extension_keys(tensors, features, family)
    keys |= rotation_keys(rotations) | replication | provenance_keys(source.carried())
    inputs = {"version": version("rondel"), "config": asdict(config), "source": source.fingerprint()}
    keys[Rondel.EXPORT_SHA256] = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    entries = [entry(tensor) for tensor in tensors]
    return _Content(source, tensors, entries, keys, alignment, encoding, file_name(described, encoding))


def _shards(entries: list[Entry], most: int | None, alignment: int) -> list[list[Entry]]:
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


def _files(content: _Content, out: Path, split: int | None) -> list[_File]:
    """The files to write, first to last. Metadata is in the first; every one can be verified by itself."""
    path = out / content.default_name if out.is_dir() else out
    runs = _shards(content.entries, split, content.alignment)
    if len(runs) > MOST_SHARDS:
        raise RondelError(f"--split {split}: makes {len(runs)} files, at most {MOST_SHARDS} are possible")
    stem = path.name.removesuffix(".gguf")
    files = []
    first = 0
    for number, run in enumerate(runs):
        keys: dict[str, Value] = {}
        place = path
        if len(runs) > 1:
            place = path.with_name(f"{stem}-{number + 1:05d}-of-{len(runs):05d}.gguf")
            keys = {
                Split.NUMBER: np.uint16(number),
                Split.COUNT: np.uint16(len(runs)),
                Split.TENSORS: np.int32(len(content.entries)),
            }
        shared = (General.ALIGNMENT, Rondel.EXPORT_SHA256)
        kept = {key: content.keys[key] for key in shared if key in content.keys} if number else content.keys
        keys = kept | keys | {Rondel.TENSOR_SHA256: hashes_placeholder(run)}
        files.append(_File(place, keys, first, run))
        first += len(run)
    return files


def _is_made(files: Sequence[_File], force: bool) -> bool:
    """Whether an earlier run with the same inputs and settings wrote all files; refuses to replace anything else."""
    existing = [file for file in files if file.path.exists()]
    for file in existing:
        if not file.path.is_file():
            raise RondelError(f"{file.path}: is not a file; choose another -o")
    if len(existing) == len(files) and all(_made_from(file) for file in files):
        return True
    if existing and not force:
        raise RondelError(
            f"{existing[0].path}: exists with other contents; choose another -o, or use --force to replace it"
        )
    return False


def _made_from(file: _File) -> bool:
    """Whether the file on the disk has the size and the inputs of the one to write."""
    try:
        keys = GgufFile(file.path).keys
    except RondelError:
        return False
    alignment = file.keys.get(General.ALIGNMENT, ALIGNMENT)
    same_size = file.path.stat().st_size == file_size(file.keys, file.entries, alignment)
    return same_size and keys.get(Rondel.EXPORT_SHA256) == file.keys[Rondel.EXPORT_SHA256]


def plan(source: Checkpoint, out: Path, config: ExportConfig) -> dict[str, Any]:
    """What `export` would write: files with their exact sizes in bytes, the architecture, and bytes by format."""
    content = _content(source, config)
    formats: dict[str, int] = {}
    for tensor, listed in zip(content.tensors, content.entries, strict=True):
        formats[tensor.format] = formats.get(tensor.format, 0) + listed.bytes
    files = _files(content, out, config.split)
    return {
        "architecture": content.keys[General.ARCHITECTURE],
        "requires": content.keys.get(Rondel.REQUIRES, []),
        "encoding": content.encoding,
        "tensors": len(content.tensors),
        "bytes_by_format": dict(sorted(formats.items())),
        "files": [
            {"name": file.path.name, "bytes": file_size(file.keys, file.entries, content.alignment)} for file in files
        ],
    }


def export(
    source: Checkpoint, out: Path, config: ExportConfig, *, force: bool = False, progress: Progress = silent
) -> list[Path]:
    """Write the GGUF file or files and return their paths, the first to open first.

    `out` is a file name, or a folder that gets a file named by GGUF's convention. Existing files of the same inputs and
    settings are left as they are.
    """
    content = _content(source, config)
    files = _files(content, out, config.split)
    paths = [file.path for file in files]
    if _is_made(files, force):
        return paths
    if not paths[0].parent.is_dir():
        raise RondelError(f"{paths[0].parent}: there is no such folder")
    total = len(content.tensors)
    progress(0, total, "export")
    partials = [path.with_name(path.name + ".partial") for path in paths]
    try:
        for file, partial in zip(files, partials, strict=True):

            def read(index: int, first: int = file.first) -> np.ndarray:
                data = tensor_bytes(source, content.tensors[first + index])
                progress(first + index + 1, total, "export")
                return data

            write_gguf(partial, file.keys, file.entries, read, alignment=content.alignment)
        for partial, path in reversed(list(zip(partials, paths, strict=True))):
            partial.replace(path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    return paths
