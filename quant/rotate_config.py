"""Owns what rotate can be asked for, and which randomized Hadamards that means for a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import OUTPUT
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.rotation import HADAMARD, Rotation, site_size
from rondel.quant.hadamard import largest_block, pack_signs, random_signs, unpack_signs
from rondel.quant.planes import plane_rotation


@dataclass(frozen=True)
class RotateConfig:
    """What to rotate. Sizes without a Hadamard matrix of their own are turned in the largest blocks that have one."""

    rotate: Literal["auto", "always", "never"] = (
        "auto"  # auto: with statistics, nothing turns unless `type` gains by it
    )
    type: str = "Q4_K_M"  # of quantize: what the decision and `tries` are about
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
    numbers, seed, made = source.numbers, config.seed, []
    if config.residual:
        made.append(_random(numbers, "residual", largest_block(numbers.width), seed))
        if config.keep_tied:
            made.append(replace(made[-1], site="boundary", online=True))
    if config.heads:
        made.append(_heads(numbers, seed))
    if latents := numbers.latents:
        sizes = {"q_latent": latents.queries, "kv_latent": latents.keys_values} if config.latents else {}
        made += [_random(numbers, site, largest_block(size), seed) for site, size in sizes.items() if size]
        if config.nope:
            made.append(_random(numbers, "nope", largest_block(latents.nope), seed))
    if config.rope_pairs:
        made.append(plane_rotation(source, seed))
    if config.queries != "none":
        made.append(_random(numbers, "queries", _block(numbers.head_dim, config.queries), seed, online=True))
    if config.hidden != "none":
        for site, size in hidden_sites(source).items():
            made.append(_random(numbers, site, _block(size, config.hidden), seed, online=True))
    return made


def _random(numbers: Hyperparameters, site: str, block: int, seed: int, online: bool = False) -> Rotation:
    size = site_size(numbers, site)
    return Rotation(site, HADAMARD, online, size, block, random_signs(size, seed, site), seed=seed)


def _heads(numbers: Hyperparameters, seed: int) -> Rotation:
    """R2: the query heads of a group read the same value head, so they share its signs."""
    values = numbers.size("values")
    signs = unpack_signs(random_signs(values, seed, "values"), values).reshape(numbers.kv_heads, numbers.value_dim)
    shared = pack_signs(signs.repeat_interleave(numbers.heads // numbers.kv_heads, 0).flatten())
    size, block = site_size(numbers, "heads"), largest_block(numbers.value_dim)
    return Rotation("heads", HADAMARD, False, size, block, shared, seed=seed)


def _block(size: int, asked: int | str) -> int:
    return largest_block(size) if asked == "full" else int(asked)


def hidden_sites(source: Checkpoint) -> dict[str, int]:
    """The sites of this model between up and down, and their channels: dense, of each expert, of the shared expert."""
    numbers = source.numbers
    readers = [linear for linear in source.family.linears if linear.reads.startswith("hidden")]
    present = [linear for linear in readers if any(linear.is_in(layer, numbers) for layer in range(numbers.layers))]
    return {linear.reads: site_size(numbers, linear.reads) for linear in present}


def unties_head(source: Checkpoint, config: RotateConfig) -> bool:
    """Whether the head gets a matrix of its own: the gain folds into it, and cannot fold into the embedding."""
    return config.residual and not config.keep_tied and OUTPUT not in source
