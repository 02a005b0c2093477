"""manifest.json and the shards beside it as plain facts: what `inspect` and `verify` read without loading torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rondel.converters.errors import RondelError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
PLAIN = ("F32", "F16", "BF16", "I32", "F64")  # stored as they are; every other format is blocks
HEADER_LIMIT = 100_000_000  # bytes: what the safetensors format allows a header to have
CHUNK = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is without reading it. Shape: rows (outputs) first, of the weights, not of the packed bytes."""

    name: str
    shape: tuple[int, ...]
    format: str  # one of PLAIN, or a block format such as "Q4_K" or "U4-128"
    shard: str  # file name inside the folder
    sha256: str  # of the stored bytes

    @property
    def packed(self) -> bool:
        """Whether the stored bytes are blocks rather than plain numbers."""
        return self.format not in PLAIN


def digest_of(value: Any) -> str:
    """The hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a folder that a rondel stage wrote."""
    path = root / MANIFEST
    if not path.is_file():
        raise RondelError(f"{root}: holds no {MANIFEST}; expected a folder that a rondel stage wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RondelError(f"{path}: not readable as a manifest ({error}); run its stage again") from error
    if not isinstance(manifest, dict) or manifest.get("manifest_version") != MANIFEST_VERSION:
        found = manifest.get("manifest_version") if isinstance(manifest, dict) else type(manifest).__name__
        raise RondelError(f"{path}: expected manifest version {MANIFEST_VERSION}, got {found!r}; update rondel")
    _check_entries(manifest, path)
    return manifest


def _check_entries(manifest: dict[str, Any], path: Path) -> None:
    """Refuse a manifest whose tensors or stages are not described as rondel does, or lie outside the folder."""
    tensors, stages = manifest.get("tensors"), manifest.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise RondelError(f"{path}: stages must be a list of records; the file is damaged, run its stage again")
    if not isinstance(tensors, dict):
        raise RondelError(f"{path}: tensors must be an object by name; the file is damaged, run its stage again")
    for name, entry in tensors.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not whole or not all(isinstance(entry.get(key), str) for key in ("format", "shard", "sha256")):
            raise RondelError(f"{path}: tensor {name} is not described; the file is damaged, run its stage again")
        shard = entry["shard"]
        if Path(shard).name != shard or "\\" in shard:
            raise RondelError(f"{path}: tensor {name} is said to be in {shard!r}, expected a file of this folder")


def tensor_infos(manifest: dict[str, Any]) -> dict[str, TensorInfo]:
    """The tensors that a manifest lists, by name, in the order they were written."""
    return {
        name: TensorInfo(name, tuple(entry["shape"]), entry["format"], entry["shard"], entry["sha256"])
        for name, entry in manifest["tensors"].items()
    }


def shard_spans(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes lie in a safetensors file: name -> (first byte, byte behind the last)."""
    if not path.is_file():
        raise RondelError(f"{path}: the file is missing; run the stage that made the folder again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise RondelError(f"{path}: not a safetensors file, or cut off: the header should have {length} bytes")
        try:
            header = json.loads(file.read(length))
            offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            spans = {name: (8 + length + int(first), 8 + length + int(last)) for name, (first, last) in offsets.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RondelError(f"{path}: the safetensors header cannot be read ({error})") from error
    for name, (first, last) in spans.items():
        if not 8 + length <= first <= last <= size:
            raise RondelError(f"{path}: {name} should end at byte {last}, the file has {size} bytes: it is cut off")
    return spans


def sha256_of_span(path: Path, span: tuple[int, int]) -> str:
    """The hash of the bytes of a file from span[0] up to span[1], without holding them all."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(span[0])
        left = span[1] - span[0]
        while left > 0:
            part = file.read(min(left, CHUNK))
            if not part:
                raise RondelError(f"{path}: ends {left} bytes too early")
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()
