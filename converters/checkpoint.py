"""A Checkpoint: a model on its way through the stages, with canonical tensor names (GGUF's) and row order.

An HF folder opens as a Checkpoint without copying (see huggingface.py); every stage writes its own folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rondel.converters.errors import RondelError
from rondel.converters.families import FAMILIES
from rondel.converters.family import (
    EMBEDDING,
    OUTPUT,
    OUTPUT_NORM,
    ROPE_FACTORS,
    Family,
    canonical_shapes,
    optional_shapes,
)
from rondel.converters.folder import MANIFEST, TensorFolder, read_manifest, read_tensor, sha256_of
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.manifest import digest_of
from rondel.converters.rotation import GAINS, MATRICES, ORTHOGONAL, Rotation, matrix_name, site_size

# What travels unchanged beside the tensors.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",  # the model card: its licence goes into the GGUF
    f"{MATRICES}.safetensors",  # of the basis that the weights stand in
    f"{GAINS}.safetensors",  # of the norms that folding left as ones
)
SIZES = ("vocabulary", "context", "width", "layers", "hidden", "heads", "kv_heads", "head_dim")


class Checkpoint(TensorFolder):
    """A model folder that a stage wrote, or an HF folder seen through its family's table."""

    @property
    def family(self) -> Family:
        """The table of this model's family."""
        return FAMILIES[self.manifest["family"]]

    @property
    def numbers(self) -> Hyperparameters:
        """The sizes of this model."""
        return Hyperparameters.from_json(self.manifest["hyperparameters"])

    @property
    def rotations(self) -> list[Rotation]:
        """The changes of basis this model went through, in order; without their matrices, where they have such."""
        return [Rotation.from_json(record) for record in self.manifest.get("rotations", [])]

    def read_rotations(self) -> list[Rotation]:
        """The changes of basis with their matrices, as they were applied."""
        return read_rotations(self.root / f"{MATRICES}.safetensors", self.manifest.get("rotations", []))

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The records of the stages that made this folder, first to last."""
        return self.manifest.get("stages", [])

    @property
    def quantized(self) -> bool:
        """Whether any tensor is in a block format."""
        return any(self.info(name).packed for name in self.names())

    def shards(self) -> dict[str, list[str]]:
        """The tensors by the piece that a stage handles at a time: "embedding", "blk-00000", ..., "output"."""
        pieces: dict[str, list[str]] = {"embedding": []}
        pieces.update({f"blk-{layer:05d}": [] for layer in range(self.numbers.layers)})
        pieces["output"] = []
        for name in self.names():
            if name in (EMBEDDING, ROPE_FACTORS):
                pieces["embedding"].append(name)
            elif name in (OUTPUT_NORM, OUTPUT):
                pieces["output"].append(name)
            else:
                pieces[f"blk-{int(name.split('.')[1]):05d}"].append(name)
        return pieces

    def side_files(self) -> dict[str, Path]:
        """The tokenizer's and config's files, by name."""
        return {name: self.root / name for name in SIDE_FILES if (self.root / name).is_file()}

    def side_file_hashes(self) -> dict[str, str]:
        """The side files' contents, as hashes."""
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.side_files().items()}

    def fingerprint(self) -> str:
        """A hash of everything that a later stage reads: tensors, numbers, records and side files. Not of any path."""
        return digest_of([super().fingerprint(), self.side_file_hashes()])

    def head(self) -> str:
        """The tensor that makes the logits: the embedding where the head is tied."""
        return OUTPUT if OUTPUT in self else EMBEDDING

    def read_float(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A float tensor in the precision that the arithmetic wants."""
        return self.read(name).to(dtype)

    def carried(self) -> dict[str, Any]:
        """The part of the manifest that the next stage's manifest starts from."""
        return {key: value for key, value in self.manifest.items() if key not in ("tensors", "manifest_version")}


def check_runs(source: Checkpoint, verb: str) -> None:
    """Refuse a family whose table says that its forward pass is not built yet; `verb` as in "quantized"."""
    if not source.family.runs:
        raise RondelError(f"{source.root}: {source.family.name} models can be rotated, but not {verb} yet")


def read_rotations(path: Path, records: list[dict[str, Any]]) -> list[Rotation]:
    """The rotations of a manifest's records, with their matrices out of the file `path`."""
    rotations = [Rotation.from_json(record) for record in records]
    return [
        replace(rotation, matrix=_matrix(path, matrix_name(index), rotation))
        if rotation.kind == ORTHOGONAL
        else rotation
        for index, rotation in enumerate(rotations)
    ]


def _matrix(path: Path, name: str, rotation: Rotation) -> torch.Tensor:
    """The matrices of a rotation, (n, block, block) float64; refuses others than the record tells of."""
    matrix = read_tensor(path, name)
    blocks = rotation.size // rotation.block
    fits = matrix.dim() == 3 and matrix.shape[1:] == (rotation.block, rotation.block) and len(matrix) > 0
    if not fits or blocks % len(matrix) or matrix.dtype != torch.float64:
        raise RondelError(
            f"{path}: {name} is {matrix.dtype} {list(matrix.shape)}, expected float64 matrices for {blocks} blocks of "
            f"{rotation.block} channels; the folder is damaged, run rotate again"
        )
    if sha256_of(matrix) != rotation.sha256:
        raise RondelError(f"{path}: {name} is not the one of the manifest; run rotate again")
    return matrix


def _check(manifest: dict[str, Any], path: Path) -> None:
    """Refuse a manifest whose family, numbers, rotations or tensors do not belong together."""
    damaged = f"{path / MANIFEST}: the file is damaged, run its stage again"
    family = FAMILIES.get(str(manifest.get("family")))
    if family is None:
        raise RondelError(f"{damaged} (family {manifest.get('family')!r}, rondel knows {', '.join(FAMILIES)})")
    try:
        numbers = Hyperparameters.from_json(manifest["hyperparameters"])
        sizes = [value for key, value in numbers.to_json().items() if key in SIZES]
        if not all(type(size) is int and size > 0 for size in sizes) or numbers.layers > len(manifest["tensors"]):
            raise ValueError(f"sizes {sizes}")
        if numbers.experts and not 0 < numbers.experts.count <= len(manifest["tensors"]):
            raise ValueError(f"{numbers.experts.count} experts")
        for record in manifest.get("rotations", []):
            rotation = Rotation.from_json(record)
            if rotation.size != site_size(numbers, rotation.site):
                raise ValueError(f"rotation of {rotation.size} channels of {rotation.site}")
        shapes = canonical_shapes(family, replace(numbers, tied=True))
    except (KeyError, TypeError, ValueError) as error:
        raise RondelError(f"{damaged} ({error!r})") from error
    optional = optional_shapes(family, numbers)
    found = manifest["tensors"]
    for name in shapes:
        if name not in found:
            raise RondelError(f"{damaged} (tensor {name} is missing)")
    for name, entry in found.items():
        expected = shapes.get(name, optional.get(name))
        if expected is None or tuple(entry["shape"]) != expected:
            raise RondelError(f"{damaged} (tensor {name} is {entry['shape']}, expected {expected and list(expected)})")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a stage's folder or an HF folder."""
    if not path.is_dir():
        raise RondelError(f"{path}: not a folder; a model is a Hugging Face folder or the output of a rondel stage")
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        if manifest.get("kind") != "checkpoint":
            raise RondelError(f"{path}: holds {manifest.get('kind')!r}, a model is needed here")
        _check(manifest, path)
        return Checkpoint(path, manifest)
    from rondel.converters.huggingface import open_huggingface

    return open_huggingface(path)
