"""Owns what a set of rotations turns: the sites, and the norms' gains that fold into the matrices behind them.

RMSNorm(x) = x / rms(x) * gain. A dense change of basis does not commute with the gain, so it moves into the matrices
that read the norm's output, and ones stay behind; then RMSNorm(x R) = RMSNorm(x) R. A site in front of a norm and the
one behind it thus turn together.
"""

from __future__ import annotations

from dataclasses import replace

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import OUTPUT, OUTPUT_NORM, Family, block_tensor
from rondel.converters.rotation import ORTHOGONAL, Rotation
from rondel.converters.stats import OUTPUT_IN
from rondel.quant.hadamard import pack_signs, unpack_signs

STREAMS = ("residual", "q_latent", "kv_latent")  # what norms read


def check_stream_is_rotatable(family: Family, stream: str) -> None:
    """Refuse a family whose residual stream or latent passes a norm that no linear reads (one behind a layer)."""
    read = {linear.reads for linear in family.linears}
    for norm in family.norms:
        harmless = norm.makes is None and norm.reads in ("queries", "keys")
        if not harmless and not (norm.reads in STREAMS and norm.makes in read and norm.makes not in STREAMS):
            raise RondelError(
                f"{family.name}: {norm.role} stands between a layer and the {stream} stream, so no rotation of the "
                "stream keeps the model's function; rotate the heads alone (no residual rotation)"
            )
    for linear in family.linears:
        if linear.reads == stream:
            raise RondelError(
                f"{family.name}: {linear.role} reads the {stream} stream without a norm; leave it unrotated"
            )


def check_sites_are_bare(family: Family, sites: tuple[str, ...], option: str) -> None:
    """Refuse a family with a norm between what writes these sites and what reads them."""
    for norm in family.norms:
        if norm.reads in sites:
            raise RondelError(
                f"{family.name}: {norm.role} stands on the {norm.reads} channels, so no rotation of them keeps the "
                f"model's function; rotate with {option}"
            )


def heads_are_rotatable(family: Family) -> bool:
    """Whether nothing but attention stands between the one matrix that writes values and the one that reads them."""
    normed = any(norm.reads in ("values", "heads") for norm in family.norms)
    return not normed and len(family.writers("values")) == 1 and len(family.readers("heads")) == 1


def _site(rotations: list[Rotation], site: str) -> Rotation | None:
    return next((rotation for rotation in rotations if rotation.site == site), None)


def _shared_values(source: Checkpoint, heads: Rotation) -> Rotation:
    """The rotation of the value channels that the rotation of the heads implies: one query head of each group."""
    numbers = source.numbers
    if heads.kind == ORTHOGONAL:
        return replace(heads, site="values", size=numbers.size("values"))
    signs = unpack_signs(heads.signs, heads.size).reshape(numbers.kv_heads, -1, numbers.value_dim)[:, 0].flatten()
    return replace(heads, site="values", size=len(signs), signs=pack_signs(signs))


def turned_sites(source: Checkpoint, rotations: list[Rotation]) -> dict[str, Rotation]:
    """What turns the vectors of each site that matrices read or write; queries and the ends turn away from both."""
    turned: dict[str, Rotation] = {}
    for rotation in rotations:
        if rotation.site in ("queries", "boundary"):
            continue
        turned[rotation.site] = rotation
        turned |= {n.makes: rotation for n in source.family.norms if n.makes and n.reads == rotation.site}
        if rotation.site == "residual" and _site(rotations, "boundary") is None:
            turned[OUTPUT_IN] = rotation
        if rotation.site == "heads":
            turned["values"] = _shared_values(source, rotation)
        if rotation.site == "rope_pairs":
            turned["keys"] = rotation
            # The matrix of a key head serves the query heads of its group.
            turned["queries"] = replace(rotation, size=source.numbers.heads * source.numbers.rope_dim)
    return turned


def folded_gain(source: Checkpoint, rotations: list[Rotation], layer: int | None, site: str) -> str | None:
    """The norm whose gain folds into the columns of the matrices that read a site, or None."""
    if site == OUTPUT_IN:
        kept = _site(rotations, "residual") is None or _site(rotations, "boundary") is not None
        return None if kept else OUTPUT_NORM
    norm = source.family.norm_making(site)
    if norm is None or layer is None or _site(rotations, norm.reads) is None:
        return None
    return block_tensor(layer, norm.role)


def folded_norms(source: Checkpoint, rotations: list[Rotation]) -> list[str]:
    """The norms whose gains become ones."""
    sites = [norm.makes for norm in source.family.norms if norm.makes and source.numbers.size(norm.size)]
    places = [*((layer, site) for layer in range(source.numbers.layers) for site in sites), (None, OUTPUT_IN)]
    found = (folded_gain(source, rotations, layer, site) for layer, site in places)
    return [norm for norm in found if norm]


def place_of_reader(source: Checkpoint, name: str) -> tuple[int | None, str] | None:
    """The layer and the site whose vectors a weight's columns meet, or None where it is no matrix of a linear."""
    if name == OUTPUT:
        return None, OUTPUT_IN
    linear = source.family.linear_of(name)
    return (int(name.split(".")[1]), linear.reads) if linear and name.endswith(".weight") else None
