"""Owns what copies cost: bytes of their parameters, bytes read a token beyond the base path, and multiplications."""

from __future__ import annotations

import numpy as np

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import block_tensor
from rondel.converters.lora import HALF_BYTES
from rondel.converters.replication import ATTENTION, FFN, NO_SLOT, Replication, Step
from rondel.native.formats import format_bytes

FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def tensor_bytes(format: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of that format."""
    return FLOAT_BYTES[format] * int(np.prod(shape)) if format in FLOAT_BYTES else format_bytes(format, *shape)


def stored_bytes(found: Replication) -> int:
    """Bytes of all parameters of copies, float16."""
    return sum(HALF_BYTES * np.size(values) for one in found.sets for values in one.values())


def model_bytes(source: Checkpoint) -> int:
    """Bytes of all tensors."""
    return sum(tensor_bytes(source.info(name).format, source.info(name).shape) for name in source.names())


def _matrices(source: Checkpoint, step: Step, *, keys: bool = True) -> list[str]:
    """The matrices of a step; without `keys` those alone that are used where keys and values are another's."""
    roles = [
        linear.role
        for linear in source.family.linears
        if step.parts & (ATTENTION if linear.role.startswith("attn") else FFN)
        and (keys or linear.role not in ("attn_k", "attn_v"))
    ]
    return [name for role in roles if (name := block_tensor(step.layer, role)) in source]


def read_bytes(found: Replication, source: Checkpoint) -> int:
    """Bytes read a token beyond those of the base path: serial copies read their layer again, parallel ones do not."""
    seen: set[tuple[int, int]] = set()
    total = stored_bytes(found)
    for step in found.steps:
        if step.number and (step.group, step.layer) not in seen:
            infos = [source.info(name) for name in _matrices(source, step)]
            total += sum(tensor_bytes(info.format, info.shape) for info in infos)
        seen.add((step.group, step.layer))
    return total


def kv_bytes(found: Replication, source: Checkpoint, context: int) -> int:
    """Bytes of the copies' own caches of keys and values in float16, at so many tokens."""
    numbers = source.numbers
    return (found.slots() - found.layers) * 2 * numbers.kv_heads * numbers.head_dim * HALF_BYTES * context


def extra_compute(found: Replication, source: Checkpoint) -> float:
    """Weights that copies multiply by, as a share of those of all layers; attention's own products not counted."""
    filled: set[int] = set()
    base = copies = 0
    for step in found.steps:
        keys = step.slot != NO_SLOT and step.slot not in filled
        filled.add(step.slot)
        work = sum(int(np.prod(source.info(name).shape)) for name in _matrices(source, step, keys=keys))
        base, copies = (base, copies + work) if step.number else (base + work, copies)
    return copies / base


def copy_of_every_layer(source: Checkpoint) -> int:
    """Bytes of the parameters that one fitted copy of every layer has: gates, norm gains and output gains."""
    return HALF_BYTES * source.numbers.layers * (2 + 4 * source.numbers.width)
