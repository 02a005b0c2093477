"""Owns the way back: a rotated float model in the basis that it was made from, for whoever merges a LoRA into it.

Rotations are orthogonal, so each is undone by its transpose; the gains that folding took out of the norms lie beside
the rotated model, and a head that folding untied is tied again where it still is the embedding. The weights come back
to what storing them as F32 costs. Online rotations end with it. A column behind a gain of zero comes back as zeros:
nothing of it was left, and nothing ever read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import EMBEDDING, OUTPUT
from rondel.converters.folder import read_manifest, read_tensor, sha256_of
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.converters.rotation import GAINS, MATRICES, Rotation
from rondel.quant.hadamard import rotate_channels_back
from rondel.quant.rotator import Rotator
from rondel.quant.stage import stage_record
from rondel.quant.workers import Workers, check_device

SAME = 1e-5  # of the largest weight: how far a head that was tied may be from the embedding after two roundings to F32
FORGOTTEN = ("rotations", "rotation_search", "rotation_choice", "folded")  # keys of the manifest that end here
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class UndoConfig:
    """There is nothing to choose; the record tells this stage from a rotation."""

    undo: bool = True


class Unrotator(Rotator):
    """Turns one tensor after another back; `source` is the rotated model, `gains` are those of the folded norms."""

    def __init__(
        self,
        source: Checkpoint,
        gains: dict[str, torch.Tensor],
        workers: Workers,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(source, source.read_rotations(), workers, device=device, dtype=dtype)
        self.gains = gains

    def norm(self, name: str) -> torch.Tensor:
        """The gain that stood there."""
        return self.gains[name].to(self.dtype)

    def gain(self, name: str) -> torch.Tensor:
        """The same, for the columns behind it."""
        return self.gains[name].to(torch.float64)

    def turn(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """The inverse of the rotation, on the last axis."""
        return rotate_channels_back(x, rotation)

    def columns(self, part: torch.Tensor, rotation: Rotation | None, gain: torch.Tensor | None) -> torch.Tensor:
        """Some rows: turned back first, then without the gain."""
        part = part if rotation is None else self.turn(part, rotation)
        return part if gain is None else torch.where(gain == 0, 0.0, part / gain)


def _validate(source: Checkpoint) -> None:
    if not source.rotations:
        raise RondelError(f"{source.root}: is not rotated; there is nothing to undo")
    if source.quantized:
        raise RondelError(f"{source.root}: is quantized; undo the rotation of the float model it was made from")
    if source.manifest.get("replication"):
        raise RondelError(f"{source.root}: is replicated, and its copies belong to this basis; undo before that")


def folded_gains(source: Checkpoint) -> dict[str, torch.Tensor]:
    """The gains that rotate took out of the norms, by the norm's name. Raises RondelError where they are lost."""
    told, path = source.manifest.get("folded"), source.root / f"{GAINS}.safetensors"
    if not isinstance(told, dict) or not isinstance(told.get("norms"), dict):
        raise RondelError(f"{source.root}: tells nothing of its norms' gains; rotate the original again to undo it")
    gains = {}
    for name, digest in told["norms"].items():
        gains[name] = read_tensor(path, name)
        if name not in source or gains[name].shape != source.info(name).shape or sha256_of(gains[name]) != digest:
            raise RondelError(f"{path}: {name} is not the gain that the manifest tells of; rotate the original again")
    return gains


def plan_undo(source: Checkpoint) -> dict[str, Any]:
    """What undo would do."""
    _validate(source)
    gains = folded_gains(source)
    elements = sum(torch.Size(source.info(name).shape).numel() for name in source.names())
    return {
        "stage": "rotate",
        "undoes": [rotation.site for rotation in source.rotations],
        "folded_norms": len(gains),
        "ties_head": bool(source.manifest["folded"].get("untied")),
        "tensors": len(source.names()),
        "tensor_bytes": elements * FLOAT32_BYTES,
    }


def _ends(rotator: Unrotator, names: list[str], embedding: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The last shard; a head that is `embedding` again is left out."""
    tensors = {name: rotator.tensor(name) for name in names}
    if embedding is None:
        return tensors
    apart = float((tensors[OUTPUT] - embedding).abs().max())
    if apart <= SAME * float(embedding.abs().max()):
        del tensors[OUTPUT]
    return tensors


def undo(
    source: Checkpoint,
    out: Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Write the rotated model `source` in its original basis to `out`, all tensors F32.

    Raises RondelError for a model that is not rotated, or quantized, or whose gains are lost.
    """
    _validate(source)
    check_device(device)
    gains = folded_gains(source)
    record = stage_record("rotate", UndoConfig(), source=source)
    output = StageOutput(out, record, force=force)
    if output.finished:
        return Checkpoint(out, read_manifest(out))
    shards, untied = source.shards(), bool(source.manifest["folded"].get("untied"))
    with Workers(threads) as workers:
        rotator = Unrotator(source, gains, workers, device=device)
        for done, (shard, names) in enumerate(shards.items()):
            progress(done, len(shards), shard)
            if not output.done(shard):
                embedding = rotator.tensor(EMBEDDING) if OUTPUT in names and untied else None
                tensors = _ends(rotator, names, embedding)
                output.write(shard, tensors, {"tied": untied and OUTPUT in names and OUTPUT not in tensors})
    progress(len(shards), len(shards), "done")
    manifest = {key: value for key, value in source.carried().items() if key not in FORGOTTEN}
    numbers = manifest["hyperparameters"]
    tied = numbers["tied"] or output.result("output")["tied"]
    manifest |= {"hyperparameters": {**numbers, "tied": tied}, "stages": [*source.stages, record]}
    if source.manifest["folded"].get("fixed_target"):
        del manifest["target"]
    files = {
        name: path
        for name, path in source.side_files().items()
        if name not in (f"{MATRICES}.safetensors", f"{GAINS}.safetensors")
    }
    output.finish(list(shards), manifest, files)
    return Checkpoint(out, read_manifest(out))
