"""Owns the rotate stage: randomized Hadamard changes of basis that leave the model's function as it is.

R1 turns the residual stream and R2 the channels of each head, both fused into the weights; R4 turns the hidden layer
online, for the rondel target (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). All in float64, stored as F32.

A rotation maps a row vector x of its site to H (s o x) / sqrt(block). The same map is applied to every row of the
matrices that read the site and to every column of those that write it: scalar products stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import OUTPUT, ROPE_FACTORS, Family, canonical_shapes
from rondel.converters.folder import read_manifest
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.converters.rotation import Rotation
from rondel.converters.stats import MOVED, Stats
from rondel.quant.fold import check_residual_is_rotatable, folded_norms
from rondel.quant.hadamard import (
    hadamard_plan,
    largest_block,
    pack_signs,
    random_signs,
    unpack_signs,
)
from rondel.quant.rotated_stats import MovedStats, check_movable
from rondel.quant.rotator import Rotator
from rondel.quant.stage import stage_record
from rondel.quant.workers import Workers, check_device

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class RotateConfig:
    """What to rotate. Sizes without a Hadamard matrix of their own are turned in the largest blocks that have one."""

    residual: bool = True  # R1: the residual stream; folds the norms and gives a tied head its own matrix
    heads: bool = True  # R2: the channels of each key-value head, between v and o
    hidden: int | Literal["none", "full"] = "none"  # R4: block size; executed by the runtime, target rondel only
    kind: Literal["hadamard"] = "hadamard"
    seed: int = 0
    target: Literal["llama.cpp", "rondel"] | None = None  # None: what an earlier stage fixed, else open


def resolved_target(source: Checkpoint, config: RotateConfig) -> str | None:
    """The target that the output's manifest records; fused rotations alone leave it open (None)."""
    fixed = source.manifest.get("target")
    if fixed and config.target and fixed != config.target:
        raise RondelError(
            f"{source.root}: an earlier stage fixed the target {fixed}; --target {config.target} is too late"
        )
    return config.target or fixed


def rotations_of(source: Checkpoint, config: RotateConfig) -> list[Rotation]:
    """The rotations that a config means for a model, in the order of application."""
    numbers, made = source.numbers, []
    if config.residual:
        made.append(_random("residual", numbers.width, largest_block(numbers.width), config.seed))
    if config.heads:
        values = _random("values", numbers.size("values"), largest_block(numbers.head_dim), config.seed)
        # The query heads of a group read the same value head, so they share its signs.
        signs = unpack_signs(values.signs, values.size).reshape(numbers.kv_heads, numbers.head_dim)
        shared = signs.repeat_interleave(numbers.heads // numbers.kv_heads, 0).flatten()
        made.append(Rotation("heads", "hadamard", False, len(shared), values.block, pack_signs(shared)))
    if config.hidden != "none":
        block = largest_block(numbers.hidden) if config.hidden == "full" else int(config.hidden)
        made.append(_random("hidden", numbers.hidden, block, config.seed, online=True))
    return made


def _random(site: str, size: int, block: int, seed: int, online: bool = False) -> Rotation:
    return Rotation(site, "hadamard", online, size, block, random_signs(size, seed, site))


def _check_family(source: Checkpoint, config: RotateConfig) -> None:
    """Refuse what the family's table does not declare: a rotation must reach every reader and writer of its site."""
    family = source.family
    known = set(canonical_shapes(family, source.numbers)) | {ROPE_FACTORS, OUTPUT}
    known |= {name.removesuffix("weight") + "bias" for name in known}
    unknown = [name for name in source.names() if name not in known]
    if unknown:
        raise RondelError(
            f"{source.root}: rotate does not know what {unknown[0]} reads and writes; it cannot be rotated"
        )
    if config.residual:
        check_residual_is_rotatable(family)
    if config.heads and not _heads_are_rotatable(family):
        raise RondelError(f"{family.name}: something stands between the values and attn_output; rotate without --heads")


def _heads_are_rotatable(family: Family) -> bool:
    ends = [linear.role for linear in (*family.writers("values"), *family.readers("heads"))]
    return ends == ["attn_v", "attn_output"] and not any(norm.reads in ("values", "heads") for norm in family.norms)


def validate(source: Checkpoint, config: RotateConfig, stats: Stats | None = None) -> list[Rotation]:
    """Check everything that can be refused, and return the rotations to apply."""
    if config.kind != "hadamard":
        raise RondelError(f"rotation kind {config.kind!r} is not known; expected hadamard")
    if source.rotations:
        sites = ", ".join(rotation.site for rotation in source.rotations)
        raise RondelError(f"{source.root}: is rotated already ({sites}); rotate the model it was made from")
    if source.quantized:
        raise RondelError(f"{source.root}: is quantized; rotate before quantizing")
    if source.manifest.get("replication"):
        raise RondelError(f"{source.root}: is replicated, and its copies belong to these weights; rotate before that")
    if not (config.residual or config.heads or config.hidden != "none"):
        raise RondelError("nothing to rotate: the residual stream, the heads and the hidden layer are all left out")
    if config.hidden != "none":
        _check_hidden(source, config)
    _check_family(source, config)
    rotations = rotations_of(source, config)
    if stats is not None:
        check_movable(source, stats, rotations)
    return rotations


def _check_hidden(source: Checkpoint, config: RotateConfig) -> None:
    target = resolved_target(source, config)
    if target != "rondel":
        raise RondelError(
            "the rotation of the hidden layer runs online, which only the rondel target can do; "
            f"use --target rondel or leave it out (the target is {target or 'llama.cpp'})"
        )
    size = source.numbers.hidden
    if config.hidden == "full":
        return
    if not isinstance(config.hidden, int) or config.hidden < 1 or size % config.hidden:
        raise RondelError(
            f"blocks of {config.hidden} do not divide the {size} hidden channels; choose a divisor or 'full'"
        )
    if hadamard_plan(config.hidden) is None:
        raise RondelError(
            f"there is no Hadamard matrix of order {config.hidden} (Sylvester, Paley, Williamson); "
            f"the largest block of {size} channels is {largest_block(size)}"
        )


def _shards(source: Checkpoint, config: RotateConfig) -> dict[str, list[str]]:
    """The tensors of the output by shard: the source's, and a head of its own once the residual stream turns."""
    shards = source.shards()
    if config.residual and OUTPUT not in source:
        shards["output"] = [*shards["output"], OUTPUT]
    return shards


def plan(source: Checkpoint, config: RotateConfig, stats: Stats | None = None) -> dict[str, Any]:
    """What rotate would do: rotations with their blocks and cost, folded norms, and the bytes of the tensors."""
    rotations = validate(source, config, stats)
    names = [name for shard in _shards(source, config).values() for name in shard]
    elements = sum(torch.Size(source.info(name if name in source else source.head()).shape).numel() for name in names)
    return {
        "stage": "rotate",
        "target": resolved_target(source, config),
        "rotations": [
            {
                "site": rotation.site,
                "size": rotation.size,
                "block": rotation.block,
                "online": rotation.online,
                "additions_per_channel": _additions(rotation.block),
            }
            for rotation in rotations
        ],
        "folded_norms": len(folded_norms(source)) if config.residual else 0,
        "unties_head": config.residual and OUTPUT not in source,
        "moves_statistics": stats is not None,
        "tensors": len(names),
        "tensor_bytes": elements * FLOAT32_BYTES,
    }


def _additions(block: int) -> int:
    found = hadamard_plan(block)
    assert found is not None
    return found.additions


def rotate(
    source: Checkpoint,
    out: Path,
    config: RotateConfig,
    stats: Stats | None = None,
    *,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Write the rotated model to `out`, all tensors F32; the function stays (1e-10 relative in float64 logits).

    `stats` (full second moments of the unrotated model) move into the new basis and are written to `out`/stats, where
    quantize finds them. Raises RondelError for a rotated or quantized model and for what the family does not allow.
    """
    rotations = validate(source, config, stats)
    check_device(device)
    target = resolved_target(source, config)
    record = stage_record("rotate", config, source=source, stats=stats)
    output = StageOutput(out, record, force=force, beside=(MOVED,))
    if output.finished:
        return Checkpoint(out, read_manifest(out))
    shards = _shards(source, config)
    total = len(shards) + (stats is not None)
    with Workers(threads) as workers:
        rotator = Rotator(source, rotations, workers, device=device)
        for done, (shard, names) in enumerate(shards.items()):
            progress(done, total, shard)
            if not output.done(shard):
                output.write(shard, {name: rotator.tensor(name) for name in names})
        if stats is not None:
            progress(len(shards), total, "statistics")
            MovedStats(source, stats, rotations, workers).write(output.partial, record)
    progress(total, total, "done")
    carried = source.carried()
    manifest = {
        **carried,
        "hyperparameters": {
            **carried["hyperparameters"],
            "tied": carried["hyperparameters"]["tied"] and not config.residual,
        },
        **({"target": target} if target else {}),
        "rotations": [rotation.to_json() for rotation in rotations],
        "stages": [*source.stages, record],
    }
    output.finish(list(shards), manifest, source.side_files())
    return Checkpoint(out, read_manifest(out))
