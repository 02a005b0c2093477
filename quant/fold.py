"""Owns norm folding: which gains multiply the columns of which readers, and what is left in the norm.

RMSNorm(x) = x / rms(x) * gain. A dense change of basis does not commute with the gain, so it moves into the matrices
that read the norm's output, and ones stay behind; then RMSNorm(x R) = RMSNorm(x) R.
"""

from __future__ import annotations

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import OUTPUT, OUTPUT_NORM, Family, block_tensor


def foldable_norms(family: Family) -> dict[str, str]:
    """Site to the role of the norm that makes it from the residual stream, for every norm of a block that folds."""
    return {norm.makes: norm.role for norm in family.norms if norm.reads == "residual" and norm.makes is not None}


def check_residual_is_rotatable(family: Family) -> None:
    """Refuse a family whose residual stream passes a norm that no linear reads (norms behind a layer, for one)."""
    read = {linear.reads for linear in family.linears}
    for norm in family.norms:
        harmless = norm.makes is None and norm.reads in ("queries", "keys")
        if not harmless and not (norm.reads == "residual" and norm.makes in read):
            raise RondelError(
                f"{family.name}: {norm.role} stands between a layer and the residual stream, so no rotation of the "
                "stream keeps the model's function; rotate the heads alone (no residual rotation)"
            )
    for linear in family.linears:
        if linear.reads == "residual":
            raise RondelError(
                f"{family.name}: {linear.role} reads the residual stream without a norm; leave it unrotated"
            )


def gain_of_reader(source: Checkpoint, name: str) -> str | None:
    """The norm whose gain folds into the columns of this weight, or None."""
    if name == OUTPUT:
        return OUTPUT_NORM
    if not name.startswith("blk.") or not name.endswith(".weight"):
        return None
    _, layer, role, _ = name.split(".")
    reads = next((linear.reads for linear in source.family.linears if linear.role == role), None)
    norm = foldable_norms(source.family).get(reads) if reads else None
    return block_tensor(int(layer), norm) if norm else None


def folded_norms(source: Checkpoint) -> list[str]:
    """The norms whose gains become ones."""
    roles = foldable_norms(source.family).values()
    return [block_tensor(layer, role) for layer in range(source.numbers.layers) for role in roles] + [OUTPUT_NORM]
