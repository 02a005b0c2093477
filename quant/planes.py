"""Owns rotations inside RoPE's planes, one angle a pair of channels: the only changes of basis that commute with RoPE.

The queries that meet a key turn by its angles, so scalar products stay what they were. Fused into the matrices of both.
"""

from __future__ import annotations

import hashlib
import math

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import block_tensor
from rondel.converters.rotation import HADAMARD, Rotation, site_size
from rondel.quant.orthogonal import with_matrix

SITE = "rope_pairs"
ANGLE_BYTES = 4


def random_angles(count: int, seed: int) -> torch.Tensor:
    """Angles in [0, 2 pi), (count,) float64: a SHA-256 stream of the seed, so that a seed means the same for ever."""
    stream = b""
    while len(stream) < count * ANGLE_BYTES:
        stream += hashlib.sha256(f"rondel angles 1|{seed}|{SITE}|{len(stream)}".encode()).digest()
    turns = [int.from_bytes(stream[i : i + ANGLE_BYTES], "little") for i in range(0, count * ANGLE_BYTES, ANGLE_BYTES)]
    return torch.tensor(turns, dtype=torch.float64) * (2 * math.pi / 256**ANGLE_BYTES)


def pair_channels(size: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels (size / 2,) of a head that stand first and second in RoPE's pairs."""
    if layout == "interleaved":
        return torch.arange(0, size, 2), torch.arange(1, size, 2)
    return torch.arange(size // 2), torch.arange(size // 2, size)


def plane_rotation(source: Checkpoint, seed: int) -> Rotation:
    """Random angles for every key head of a model: (a, b) becomes (a cos - b sin, a sin + b cos)."""
    heads, size = source.numbers.key_heads, source.numbers.rope_dim
    angles = random_angles(heads * size // 2, seed).reshape(heads, -1)
    first, second = pair_channels(size, source.family.rope_layout)
    matrix = torch.zeros(heads, size, size, dtype=torch.float64)
    matrix[:, first, first] = matrix[:, second, second] = angles.cos()
    matrix[:, first, second], matrix[:, second, first] = angles.sin(), -angles.sin()
    return with_matrix(Rotation(SITE, HADAMARD, False, site_size(source.numbers, SITE), size, seed=seed), matrix)


def check_planes(source: Checkpoint) -> None:
    """Refuse norms between q or k and RoPE whose gains differ inside a plane: no angle commutes with those."""
    first, second = pair_channels(source.numbers.rope_dim, source.family.rope_layout)
    norms = [norm for norm in source.family.norms if norm.reads in ("queries", "keys")]
    for name in (block_tensor(layer, norm.role) for layer in range(source.numbers.layers) for norm in norms):
        gain = source.read(name)
        if not torch.equal(gain[first], gain[second]):
            raise RondelError(
                f"{source.root}: {name} differs between the two channels of a RoPE pair, so no rotation of pairs "
                "keeps the model's function; rotate without --rope-pairs"
            )
