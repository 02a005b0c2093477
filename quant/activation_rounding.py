"""Owns what the activation kinds of a copy mean: input rows of its linears, rounded to a grid of their own and back.

Seeds go through one counter hash, so that the runtime and this file, any batch and any number of threads see the same
numbers: h = 0, then h = mix(h + word + 0x9e3779b97f4a7c15) mod 2^64 for each word, with the finalizer of SplitMix64
(Steele, Lea and Flood 2014) as `mix`.
"""

from __future__ import annotations

import numpy as np
import torch

from rondel.converters.replication_kinds import ACTIVATION_KINDS, ParameterSet
from rondel.quant.hadamard import hadamard_transform

# Where a row stands in its layer, which the hash of stochastic rounding reads: by the linears that it feeds.
PLACES = {"attn_q": 0, "attn_k": 0, "attn_v": 0, "attn_output": 1, "ffn_gate": 2, "ffn_up": 2, "ffn_down": 3}
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_words(*words: int | np.ndarray) -> np.ndarray:
    """The counter hash of non-negative words, uint64 of their broadcast shape."""
    h = np.zeros(1, np.uint64)
    for word in words:
        h = h + np.asarray(word, np.uint64) + _GOLDEN
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def dither(seed: int, layer: int, place: int, positions: np.ndarray, channels: int) -> np.ndarray:
    """The uniform numbers of stochastic rounding, multiples of 2^-24 in [0, 1), (positions, channels) float32."""
    h = hash_words(seed, layer, place, positions[:, None], np.arange(channels))
    return (h >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def turn(x: torch.Tensor, seed: int, *, back: bool = False) -> torch.Tensor:
    """x (..., channels) times hashed signs and Sylvester's matrix on its largest blocks of 2^k, or that undone."""
    channels = x.shape[-1]
    signs = 1.0 - 2.0 * (hash_words(seed, np.arange(channels)) & np.uint64(1)).astype(np.float64)
    flips = torch.from_numpy(signs).to(x.dtype)
    block = channels & -channels
    return hadamard_transform(x, block) * flips if back else hadamard_transform(x * flips, block)


def round_activations(
    x: torch.Tensor, values: ParameterSet, layer: int, place: int, positions: np.ndarray
) -> torch.Tensor:
    """x (n, channels) as a step with these values reads it: x itself where no activation kind is among them.

    Each row is rounded to multiples of act_scale * act_clip * max|x| / (2^(bits-1) - 1), at most 2^(bits-1) - 1 of them
    on either side of zero. A row whose step would not be positive stays as it is.
    """
    if not values.keys() & ACTIVATION_KINDS.keys():
        return x
    one = {kind: float(values[kind][0]) if kind in values else row.identity for kind, row in ACTIVATION_KINDS.items()}
    rotation, seed, levels = int(one["rotation_seed"]), int(one["rounding"]), 2.0 ** (one["act_bits"] - 1) - 1
    y = turn(x, rotation) if rotation else x
    step = one["act_scale"] * one["act_clip"] * y.abs().amax(-1, keepdim=True) / levels
    scaled = y / torch.where(step > 0, step, 1.0)
    if seed:
        offsets = torch.from_numpy(dither(seed, layer, place, positions, x.shape[-1])).to(x.dtype)
        codes = (scaled + offsets).floor()
    else:
        codes = scaled.round()
    rounded = codes.clamp(-levels, levels) * step
    rounded = turn(rounded, rotation, back=True) if rotation else rounded
    return torch.where(step > 0, rounded, x)
