"""Owns what rotate refuses, in one sentence each, before anything is written."""

from __future__ import annotations

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import OUTPUT, canonical_shapes, optional_shapes
from rondel.converters.rotation import Rotation
from rondel.converters.stats import Stats
from rondel.quant.fold import check_sites_are_bare, check_stream_is_rotatable, heads_are_rotatable
from rondel.quant.hadamard import hadamard_plan, largest_block
from rondel.quant.planes import check_planes
from rondel.quant.rotate_config import RotateConfig, hidden_sites, resolved_target, rotations_of
from rondel.quant.rotated_stats import check_movable
from rondel.quant.rotation_search import check_search


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
    if config.rope_pairs:
        check_planes(source)
    if config.nope and source.numbers.latents:
        check_sites_are_bare(family, ("nope", "queries", "keys"), "--no-nope")
    if config.hidden != "none":
        check_sites_are_bare(family, ("hidden", "hidden_experts", "hidden_shared"), "--hidden none")


def check_unturned(source: Checkpoint) -> None:
    """Refuse a model that a later stage has been at, or this one."""
    if source.rotations:
        sites = ", ".join(rotation.site for rotation in source.rotations)
        raise RondelError(f"{source.root}: is rotated already ({sites}); rotate the model it was made from")
    if source.quantized:
        raise RondelError(f"{source.root}: is quantized; rotate before quantizing")
    if source.manifest.get("replication"):
        raise RondelError(f"{source.root}: is replicated, and its copies belong to these weights; rotate before that")


def validate(source: Checkpoint, config: RotateConfig, stats: Stats | None = None) -> list[Rotation]:
    """Check everything that can be refused, and return the rotations to apply."""
    check_unturned(source)
    _check_family(source, config)
    _check_online(source, config)
    rotations = rotations_of(source, config)
    if not rotations:
        raise RondelError("nothing to rotate: every part of the model that could turn is left out")
    check_search(source, config, stats, rotations)
    if stats is not None:
        check_movable(source, stats, rotations)
    return rotations


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
