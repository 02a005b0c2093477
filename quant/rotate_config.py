"""Owns what rotate can be asked for, and which randomized Hadamards that means for a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import OUTPUT, Hyperparameters
from rondel.converters.rotation import HADAMARD, Rotation
from rondel.quant.hadamard import largest_block, pack_signs, random_signs, unpack_signs
from rondel.quant.planes import plane_rotation


@dataclass(frozen=True)
class RotateConfig:
    """What to rotate. Sizes without a Hadamard matrix of their own are turned in the largest blocks that have one."""

    residual: bool = True  # R1: the residual stream; folds the norms and gives a tied head its own matrix
    keep_tied: bool = False  # a tied head keeps its basis, the runtime turns the stream's ends: target rondel only
    heads: bool = True  # R2: the channels of each key-value head, between v and o
    latents: bool = True  # of the queries and of keys and values, where attention has them; folds their norms
    nope: bool = True  # what a head's query and key hold without RoPE, where they do
    rope_pairs: bool = False  # the planes of RoPE in queries and keys, by random angles; fused
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
    """The Hadamards that a config means for a model, or starts from, and RoPE's planes; in the order of application."""
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
    if config.rope_pairs:
        made.append(plane_rotation(source, config.seed))
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


def unties_head(source: Checkpoint, config: RotateConfig) -> bool:
    """Whether the head gets a matrix of its own: the gain folds into it, and cannot fold into the embedding."""
    return config.residual and not config.keep_tied and OUTPUT not in source
