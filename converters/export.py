"""The last stage: a checkpoint becomes one GGUF file, or several by size, for llama.cpp or for rondel's own runtime.

Tensors are read, converted and written one at a time; nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from rondel.converters.checkpoint import Checkpoint, check_runs
from rondel.converters.errors import RondelError
from rondel.converters.gguf_keys import ALIGNMENT, EXTENDED_ALIGNMENT, General, Rondel
from rondel.converters.gguf_parts import GgufPart, gguf_parts, is_made, write_parts
from rondel.converters.gguf_writer import HASH_DIGITS, Entry, Value, header
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
NO_HASH = "0" * HASH_DIGITS


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

    tensors: list[Outgoing]
    entries: list[Entry]
    keys: dict[str, Value]
    alignment: int
    encoding: str  # the type or mixture, for the file's name
    default_name: str

    def files(self, out: Path, split: int | None) -> list[GgufPart]:
        """The files to write at `out`, a file name or a folder."""
        path = out / self.default_name if out.is_dir() else out
        return gguf_parts(path, self.keys, self.entries, split, self.alignment)


def _check(source: Checkpoint, config: ExportConfig) -> None:
    check_runs(source, "exported")
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
    """The name of the type or mixture: what the user asked of quantize, or the type that most weights have."""
    if source.quantized:
        for stage in reversed(source.stages):
            config_of = stage.get("config", {}) if stage.get("name") == "quantize" else {}
            asked = config_of.get("type") or config_of.get("like")
            if isinstance(asked, str):
                return asked
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


def _content(source: Checkpoint, config: ExportConfig, *, hashed: bool, recipe: str | None = None) -> _Content:
    """Decide and check everything. Unhashed, no weight is read and hashes that are not known yet are zeros."""
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
    keys |= rotation_keys(rotations) | replication
    keys |= provenance_keys(source.carried() if hashed else source.manifest)
    if recipe is not None:
        keys[Rondel.RECIPE] = recipe
    keys[Rondel.EXPORT_SHA256] = _inputs_sha256(source, config, recipe) if hashed else NO_HASH
    entries = [entry(tensor) for tensor in tensors]
    return _Content(tensors, entries, keys, alignment, encoding, file_name(described, encoding))


def header_bytes(source: Checkpoint, recipe: str | None = None) -> tuple[int, int]:
    """Bytes before the tensors of the file that `export` writes: all, and without the keys of rondel's own.

    Only the manifest and the side files are read: the tensors of `source` need not be there yet.
    """
    part = _content(source, ExportConfig(), hashed=False, recipe=recipe).files(Path("model.gguf"), None)[0]
    standard = {key: value for key, value in part.keys.items() if not key.startswith(Rondel.PREFIX)}
    whole, rest = (len(header(keys, part.entries, part.alignment)[0]) for keys in (part.keys, standard))
    return whole, rest


def _inputs_sha256(source: Checkpoint, config: ExportConfig, recipe: str | None) -> str:
    """What decides whether an existing file is the one to write."""
    inputs = {"version": version("rondel"), "config": asdict(config), "source": source.fingerprint(), "recipe": recipe}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def plan(source: Checkpoint, out: Path, config: ExportConfig) -> dict[str, Any]:
    """What `export` would write: files with their exact sizes in bytes, the architecture, and bytes by format."""
    content = _content(source, config, hashed=False)
    formats: dict[str, int] = {}
    for tensor, listed in zip(content.tensors, content.entries, strict=True):
        formats[tensor.format] = formats.get(tensor.format, 0) + listed.bytes
    return {
        "architecture": content.keys[General.ARCHITECTURE],
        "requires": content.keys.get(Rondel.REQUIRES, []),
        "encoding": content.encoding,
        "tensors": len(content.tensors),
        "bytes_by_format": dict(sorted(formats.items())),
        "files": [{"name": part.path.name, "bytes": part.size()} for part in content.files(out, config.split)],
    }


def export(
    source: Checkpoint,
    out: Path,
    config: ExportConfig,
    *,
    recipe: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> list[Path]:
    """Write the GGUF file or files and return their paths, the first to open first.

    `out` is a file name, or a folder that gets a file named by GGUF's convention. Existing files of the same inputs and
    settings are left as they are. `recipe` is the TOML text that the chain ran by, kept in the file.
    """
    if not out.is_dir() and not out.parent.is_dir():
        raise RondelError(f"{out.parent}: there is no such folder; make it first")
    content = _content(source, config, hashed=True, recipe=recipe)
    parts = content.files(out, config.split)
    if not is_made(parts, force=force):
        total = len(content.tensors)
        progress(0, total, "export")

        def read(index: int) -> np.ndarray:
            data = tensor_bytes(source, content.tensors[index])
            progress(index + 1, total, "export")
            return data

        write_parts(parts, read)
    return [part.path for part in parts]
