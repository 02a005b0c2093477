"""Owns the rotate stage: randomized Hadamard changes of basis that leave the model's function as it is.

R1 turns the residual stream and R2 the channels of each head, both fused into the weights; R3 turns queries and keys
and R4 the hidden layer online, for the rondel target (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). Latent
attention adds its latents and what its heads hold without RoPE, fused. All in float64, stored as F32.

A rotation maps a row vector x of its site to H (s o x) / sqrt(block). The same map is applied to every row of the
matrices that read the site and to every column of those that write it: scalar products stay what they were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import OUTPUT, Hyperparameters, canonical_shapes, optional_shapes
from rondel.converters.folder import read_manifest
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.converters.rotation import HADAMARD, MATRICES, Rotation
from rondel.converters.stats import MOVED, Stats
from rondel.quant.fold import check_stream_is_rotatable, folded_norms, heads_are_rotatable
from rondel.quant.hadamard import (
    hadamard_plan,
    largest_block,
    pack_signs,
    random_signs,
    unpack_signs,
)
from rondel.quant.rotated_stats import MovedStats, check_movable
from rondel.quant.rotation_search import RotationSearch, check_search, planned_kind
from rondel.quant.rotator import Rotator
from rondel.quant.stage import stage_record
from rondel.quant.workers import Workers, check_device

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class RotateConfig:
    """What to rotate. Sizes without a Hadamard matrix of their own are turned in the largest blocks that have one."""

    residual: bool = True  # R1: the residual stream; folds the norms and gives a tied head its own matrix
    keep_tied: bool = (
        False  # a tied head keeps its basis: the runtime turns both ends of the stream, target rondel only
    )
    heads: bool = True  # R2: the channels of each key-value head, between v and o
    latents: bool = True  # of the queries and of keys and values, where attention has them; folds their norms
    nope: bool = True  # what a head's query and key hold without RoPE, where they do
    queries: int | Literal["none", "full"] = "none"  # R3: block size of queries and keys; like R4
    hidden: int | Literal["none", "full"] = "none"  # R4: block size; executed by the runtime, target rondel only
    kind: Literal["hadamard", "orthogonal", "optrot", "dfrot"] = "hadamard"  # of the fused ones
    seed: int = 0
    tries: int = 1  # seeds from `seed` on; the best is taken, by `type` with statistics, else by fourth powers
    type: str = "Q4_0"  # the format that tries are judged by
    massive: Literal["keep", "weight", "ignore"] = "weight"  # what dfrot makes of massive tokens
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
    """The Hadamards that a config means for a model, or starts from, in the order of application."""
    numbers, made = source.numbers, []
    if config.residual:
        made.append(_random("residual", numbers.width, largest_block(numbers.width), config.seed))
        if config.keep_tied:
            made.append(replace(made[-1], site="boundary", online=True))
    if config.heads:
        values = _random("values", numbers.size("values"), largest_block(numbers.value_dim), config.seed)
        # The query heads of a group read the same value head, so they share its signs.
        signs = unpack_signs(values.signs, values.size).reshape(numbers.kv_heads, numbers.value_dim)
        shared = signs.repeat_interleave(numbers.heads // numbers.kv_heads, 0).flatten()
        packed = pack_signs(shared)
        made.append(Rotation("heads", HADAMARD, False, len(shared), values.block, packed, seed=config.seed))
    if numbers.latents:
        made += _latents(numbers, config)
    if config.queries != "none":
        block = _block(numbers.head_dim, config.queries)
        made.append(_random("queries", numbers.head_dim, block, config.seed, online=True))
    if config.hidden != "none":
        for site, size in hidden_sites(source).items():
            made.append(_random(site, size, _block(size, config.hidden), config.seed, online=True))
    return made


def _latents(numbers: Hyperparameters, config: RotateConfig) -> list[Rotation]:
    latents = numbers.latents
    assert latents is not None
    sizes = {"q_latent": latents.queries, "kv_latent": latents.keys_values} if config.latents else {}
    made = [_random(site, size, largest_block(size), config.seed) for site, size in sizes.items() if size]
    if config.nope:
        made.append(_random("nope", numbers.heads * latents.nope, largest_block(latents.nope), config.seed))
    return made


def _block(size: int, asked: int | str) -> int:
    return largest_block(size) if asked == "full" else int(asked)


def hidden_sites(source: Checkpoint) -> dict[str, int]:
    """The sites of this model between up and down, and their channels: dense, of each expert, of the shared expert."""
    numbers = source.numbers
    readers = [linear for linear in source.family.linears if linear.reads.startswith("hidden")]
    present = [linear for linear in readers if any(linear.is_in(layer, numbers) for layer in range(numbers.layers))]
    return {linear.reads: numbers.size(linear.cols) for linear in present}


def _random(site: str, size: int, block: int, seed: int, online: bool = False) -> Rotation:
    return Rotation(site, HADAMARD, online, size, block, random_signs(size, seed, site), seed=seed)


def _check_family(source: Checkpoint, config: RotateConfig) -> None:
    """Refuse what the family's table does not declare: a rotation must reach every reader and writer of its site."""
    family = source.family
    known = canonical_shapes(family, source.numbers).keys() | optional_shapes(family, source.numbers).keys()
    unknown = [name for name in source.names() if name not in known]
    if unknown:
        raise RondelError(
            f"{source.root}: rotate does not know what {unknown[0]} reads and writes; it cannot be rotated"
        )
    if config.residual:
        check_stream_is_rotatable(family, "residual")
    if config.latents and source.numbers.latents:
        check_stream_is_rotatable(family, "q_latent")
        check_stream_is_rotatable(family, "kv_latent")
    if config.heads and not heads_are_rotatable(family):
        raise RondelError(f"{family.name}: something stands between the values and attn_output; rotate without --heads")


def validate(source: Checkpoint, config: RotateConfig, stats: Stats | None = None) -> list[Rotation]:
    """Check everything that can be refused, and return the rotations to apply."""
    if source.rotations:
        sites = ", ".join(rotation.site for rotation in source.rotations)
        raise RondelError(f"{source.root}: is rotated already ({sites}); rotate the model it was made from")
    if source.quantized:
        raise RondelError(f"{source.root}: is quantized; rotate before quantizing")
    if source.manifest.get("replication"):
        raise RondelError(f"{source.root}: is replicated, and its copies belong to these weights; rotate before that")
    _check_online(source, config)
    _check_family(source, config)
    rotations = rotations_of(source, config)
    if not rotations:
        raise RondelError("nothing to rotate: every part of the model that could turn is left out")
    check_search(source, config, stats, rotations)
    if stats is not None:
        check_movable(source, stats, rotations)
    return rotations


def rotation_search(
    source: Checkpoint, config: RotateConfig, stats: Stats | None, workers: Workers, device: str = "cpu"
) -> RotationSearch:
    """The search for the rotations to apply; `validate` has been called."""

    def hadamards(seed: int) -> list[Rotation]:
        return rotations_of(source, replace(config, seed=seed))

    return RotationSearch(source, config, hadamards, stats, workers=workers, device=device)


def _check_online(source: Checkpoint, config: RotateConfig) -> None:
    """Refuse rotations that run online where they cannot."""
    target, numbers = resolved_target(source, config), source.numbers
    wanted = {
        "queries and keys (--queries)": config.queries != "none",
        "the hidden layer (--hidden)": config.hidden != "none",
        "the ends of the residual stream (--keep-tied)": config.keep_tied,
    }
    for what in (what for what, asked in wanted.items() if asked and target != "rondel"):
        raise RondelError(
            f"the rotation of {what} runs online, which only the rondel target can do; "
            f"use --target rondel or leave it out (the target is {target or 'llama.cpp'})"
        )
    if config.keep_tied and (OUTPUT in source or not config.residual):
        what = "the head has a matrix of its own" if OUTPUT in source else "the residual stream does not turn"
        raise RondelError(f"{source.root}: {what}, so there is nothing for --keep-tied to keep; leave it out")
    if config.queries != "none":
        if numbers.latents:
            raise RondelError(f"{source.root}: latent attention has one key for all heads; rotate without --queries")
        _check_block("query channels of a head", numbers.head_dim, config.queries)
    if config.hidden != "none":
        for site, size in hidden_sites(source).items():
            _check_block(f"{site.replace('_', ' ')} channels", size, config.hidden)


def _check_block(what: str, size: int, block: int | str) -> None:
    if block == "full":
        return
    if not isinstance(block, int) or block < 1 or size % block:
        raise RondelError(f"blocks of {block} do not divide the {size} {what}; choose a divisor or 'full'")
    if hadamard_plan(block) is None:
        raise RondelError(
            f"there is no Hadamard matrix of order {block} (Sylvester, Paley, Williamson); "
            f"the largest block of {size} channels is {largest_block(size)}"
        )


def unties_head(source: Checkpoint, config: RotateConfig) -> bool:
    """Whether the head gets a matrix of its own: the gain folds into it, and cannot fold into the embedding."""
    return config.residual and not config.keep_tied and OUTPUT not in source


def _shards(source: Checkpoint, config: RotateConfig) -> dict[str, list[str]]:
    """The tensors of the output by shard: the source's, and a head of its own once the residual stream turns."""
    shards = source.shards()
    if unties_head(source, config):
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
                "kind": planned_kind(rotation, config),
                "seed": config.seed,
                "size": rotation.size,
                "block": rotation.block,
                "online": rotation.online,
                "additions_per_channel": _additions(rotation.block),
            }
            for rotation in rotations
        ],
        "folded_norms": len(folded_norms(source, rotations)),
        "unties_head": unties_head(source, config),
        "moves_statistics": stats is not None,
        "tries": config.tries,
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
    validate(source, config, stats)
    check_device(device)
    target = resolved_target(source, config)
    record = stage_record("rotate", config, source=source, stats=stats)
    output = StageOutput(out, record, force=force, beside=(MOVED, f"{MATRICES}.safetensors"))
    if output.finished:
        return Checkpoint(out, read_manifest(out))
    shards = _shards(source, config)
    total = len(shards) + (stats is not None)
    with Workers(threads) as workers:
        found = rotation_search(source, config, stats, workers, device).kept(output, progress)
        rotations = found.rotations
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
            "tied": carried["hyperparameters"]["tied"] and not unties_head(source, config),
        },
        **({"target": target} if target else {}),
        "rotations": [rotation.to_json() for rotation in rotations],
        **({"rotation_search": found.told} if found.told else {}),
        "stages": [*source.stages, record],
    }
    output.finish(list(shards), manifest, source.side_files())
    return Checkpoint(out, read_manifest(out))
