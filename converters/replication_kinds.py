"""The parameters of a copy: their numbers in a file, their shapes, and which of them make other keys."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rondel.converters.hyperparameters import Hyperparameters


class Kind(NamedTuple):
    """A parameter that a copy may have."""

    number: int
    dimension: str  # what its values count: "one", "heads", a name for Hyperparameters.size, "left" or "right"
    identity: float  # the value that changes nothing
    whole: bool = False  # an integer, int16 in the file; else float16


# The linears that may have a low-rank term, y += left (right x): rows of left, channels of right.
LOW_RANK = {
    "attn_q": ("queries", "width"),
    "attn_k": ("keys", "width"),
    "attn_v": ("values", "width"),
    "attn_output": ("width", "attended"),
    "ffn_gate": ("hidden", "width"),
    "ffn_up": ("hidden", "width"),
    "ffn_down": ("width", "hidden"),
}
# Any of these makes a step quantize the inputs of its linears (quant/activation_rounding.py): the scale and the clip
# multiply the largest magnitude of a row, `rounding` is 0 (nearest) or the seed of stochastic rounding, and
# `rotation_seed`, where it is not 0, turns the row for the quantizer alone.
ACTIVATION_KINDS = {
    "act_scale": Kind(16, "one", 1.0),
    "act_clip": Kind(17, "one", 1.0),
    "act_bits": Kind(18, "one", 8, whole=True),
    "rounding": Kind(19, "one", 0, whole=True),
    "rotation_seed": Kind(20, "one", 0, whole=True),
}
WHOLE_RANGES = {"act_bits": (2, 16), "rounding": (0, 32767), "rotation_seed": (0, 32767)}
KINDS: dict[str, Kind] = {
    "gate_attn": Kind(1, "one", 1.0),
    "gate_ffn": Kind(2, "one", 1.0),
    "attn_norm_gain": Kind(3, "width", 1.0),
    "ffn_norm_gain": Kind(4, "width", 1.0),
    "attn_out_gain": Kind(5, "width", 1.0),
    "ffn_out_gain": Kind(6, "width", 1.0),
    "attn_out_bias": Kind(7, "width", 0.0),
    "ffn_out_bias": Kind(8, "width", 0.0),
    "q_head_gain": Kind(9, "heads", 1.0),
    "ffn_hidden_gain": Kind(10, "hidden", 1.0),
    **ACTIVATION_KINDS,
    **{f"{role}_left": Kind(32 + 2 * index, "left", 0.0) for index, role in enumerate(LOW_RANK)},
    **{f"{role}_right": Kind(33 + 2 * index, "right", 0.0) for index, role in enumerate(LOW_RANK)},
}

# kind -> float32 values: (1,) for a gate and every kind of one value, (rows, rank) for left, (rank, channels) for right
# of a low-rank term, else (channels,). A kind that is absent is inherited.
ParameterSet = dict[str, np.ndarray]


def kind_size(kind: str, numbers: Hyperparameters) -> int:
    """The number of values of a parameter kind; of a low-rank term, of each of its ranks."""
    dimension = KINDS[kind].dimension
    if dimension in ("left", "right"):
        rows, channels = LOW_RANK[kind.rpartition("_")[0]]
        return numbers.size(rows if dimension == "left" else channels)
    if dimension == "one":
        return 1
    return numbers.heads if dimension == "heads" else numbers.size(dimension)


def kind_shape(kind: str, numbers: Hyperparameters, rank: int = 1) -> tuple[int, ...]:
    """The shape of a kind's values."""
    size = kind_size(kind, numbers)
    return {"left": (size, rank), "right": (rank, size)}.get(KINDS[kind].dimension, (size,))


def rank_limit(kind: str, numbers: Hyperparameters) -> int:
    """The largest rank of the low-rank term that a kind is half of."""
    return min(numbers.size(dimension) for dimension in LOW_RANK[kind.rpartition("_")[0]])


def attention_input(values: ParameterSet) -> ParameterSet:
    """The values that change a step's keys and values: parallel steps that differ in them cannot share a KV slot."""
    kinds = ("attn_norm_gain", *ACTIVATION_KINDS, *(f"attn_{x}_{half}" for x in "kv" for half in ("left", "right")))
    found = {kind: values[kind] for kind in kinds if kind in values}
    return {kind: value for kind, value in found.items() if kind != "attn_norm_gain" or np.any(value != 1.0)}


def shares_keys(values: ParameterSet) -> bool:
    """Whether a parallel copy with these values may read the keys and values of its layer's first execution."""
    return not attention_input(values)
