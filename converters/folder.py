"""A folder of safetensors shards with manifest.json: how checkpoints and statistics lie on disk.

Reading is lazy: a tensor is read when it is asked for, and nothing is kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rondel.converters.errors import RondelError
from rondel.converters.manifest import MANIFEST, MANIFEST_VERSION, TensorInfo, digest_of, read_manifest, tensor_infos

__all__ = [
    "FLOAT_FORMATS",
    "MANIFEST",
    "MANIFEST_VERSION",
    "PLAIN_FORMATS",
    "Packed",
    "TensorFolder",
    "TensorInfo",
    "read_manifest",
    "read_tensor",
    "sha256_of",
]

FLOAT_FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# I32: token ids, in statistics alone; F64: matrices of rotations, which no later stage computes with.
PLAIN_FORMATS = FLOAT_FORMATS | {torch.int32: "I32", torch.float64: "F64"}


@dataclass(frozen=True)
class Packed:
    """A quantized tensor on its way to disk or to a GGUF file: uint8 bytes, 1-D, of a (rows, cols) matrix."""

    data: torch.Tensor
    format: str
    shape: tuple[int, ...]


def sha256_of(tensor: torch.Tensor) -> str:
    """The hash of a tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def read_tensor(path: Path, key: str) -> torch.Tensor:
    """One tensor of a safetensors file, by its name there."""
    try:
        with safe_open(path, framework="pt") as shard:
            return shard.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise RondelError(f"{path}: tensor {key} cannot be read ({error})") from error


class TensorFolder:
    """A finished folder: its manifest and its tensors by name."""

    shareable = True  # its files hold the tensors under the names and in the order of `names`

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        self.root = root
        self.manifest = manifest
        self._infos = tensor_infos(manifest)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def names(self) -> list[str]:
        """The names of all tensors, in the order they were written."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Shape, format and place of a tensor."""
        try:
            return self._infos[name]
        except KeyError:
            raise RondelError(f"{self.root}: there is no tensor {name}") from None

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored (F32, F16, BF16, or I32 for token ids)."""
        info = self.info(name)
        if info.packed:
            raise RondelError(f"{self.root}: {name} is quantized ({info.format}), a float tensor is needed here")
        tensor = read_tensor(self.root / info.shard, name)
        found = PLAIN_FORMATS.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
        if found != (info.format, info.shape):
            raise RondelError(
                f"{self.root / info.shard}: {name} is {found[0]} {list(found[1])}, the manifest says "
                f"{info.format} {list(info.shape)}; the folder is damaged, run its stage again"
            )
        return tensor

    def packed(self, name: str) -> Packed:
        """A quantized tensor's bytes."""
        info = self.info(name)
        data = read_tensor(self.root / info.shard, name)
        if data.dtype != torch.uint8 or data.dim() != 1:
            raise RondelError(f"{self.root / info.shard}: {name} is not packed bytes; the folder is damaged")
        return Packed(data, info.format, info.shape)

    def fingerprint(self) -> str:
        """A hash of everything that a later stage reads: tensors, hyperparameters, records. Not of any path."""
        told = {key: value for key, value in self.manifest.items() if key != "stages"}
        told["tensors"] = {name: [info.format, info.shape, info.sha256] for name, info in sorted(self._infos.items())}
        return digest_of(told)
