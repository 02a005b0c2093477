"""Turns serial replication into real layers, so that unmodified llama.cpp runs every step.

Each step of the expanded path becomes one layer. What a copy changes moves into its own tensors: norm gains into the
norms, output gains and gates into the rows of attn_output and ffn_down, hidden gains into the rows of ffn_up. A part
that a step leaves out has an output of zero. What has no place in the architecture is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import block_tensor
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.outgoing import Outgoing
from rondel.converters.replication import ATTENTION, FFN, Replication, Step
from rondel.converters.replication_codec import decode_replication
from rondel.converters.replication_kinds import ACTIVATION_KINDS, LOW_RANK, ParameterSet
from rondel.converters.rotation import Rotation

MOST_LAYERS = 512  # llama.cpp's


@dataclass(frozen=True)
class Expanded:
    """A model whose layers are the steps of a path: `path[i]` is the base layer that layer i was made from."""

    tensors: list[Outgoing]
    path: list[int]

    def rotations(self, rotations: list[Rotation]) -> list[Rotation]:
        """The rotations with the numbers of the new layers."""
        return [
            rotation
            if rotation.layers is None
            else replace(rotation, layers=tuple(i for i, layer in enumerate(self.path) if layer in rotation.layers))
            for rotation in rotations
        ]


def _check_steps(found: Replication) -> None:
    """Refuse what layers that run one after the other cannot do."""
    if len(found.steps) > MOST_LAYERS:
        raise RondelError(f"--materialize: makes {len(found.steps)} layers, llama.cpp runs at most {MOST_LAYERS}")
    groups = [step.group for step in found.steps]
    slots: set[int] = set()
    for step in found.steps:
        if groups.count(step.group) > 1:
            raise RondelError(
                f"--materialize: layer {step.layer} runs in parallel with itself, which no plain layers can do; "
                "replicate serially, or export without --materialize"
            )
        if step.parts & ATTENTION and step.slot in slots:
            raise RondelError(
                f"--materialize: a copy of layer {step.layer} reads the KV cache of an earlier step, a real layer has "
                "its own; replicate with caches of their own, or export without --materialize"
            )
        slots.add(step.slot)


def _refuse(step: Step, kind: str, reason: str) -> RondelError:
    return RondelError(f"--materialize: {kind} of a copy of layer {step.layer} cannot be folded: {reason}")


def _rows(values: np.ndarray, repeat: int) -> np.ndarray:
    return np.repeat(values.astype(np.float64), repeat)


def _query_gains(step: Step, heads: np.ndarray, numbers: Hyperparameters, normed: bool) -> dict[str, np.ndarray]:
    """Gains of the query heads: rows of attn_q, or the norm behind it, which would undo them there."""
    if not normed:
        rows = _rows(heads, numbers.head_dim)
        return {"attn_q.weight": rows, "attn_q.bias": rows}
    if np.ptp(heads) > 0:
        raise _refuse(step, "q_head_gain", "this architecture normalizes all query heads with the same gains")
    return {"attn_q_norm.weight": _rows(heads[:1], numbers.head_dim)}


def _check_parameters(step: Step, parameters: ParameterSet) -> None:
    """Refuse what no tensor of a layer can hold."""
    for kind, values in parameters.items():
        role = kind.rpartition("_")[0]
        if kind in ACTIVATION_KINDS:
            raise _refuse(step, kind, "no tensor holds how activations are rounded; export without --materialize")
        if role in LOW_RANK and np.any(values):
            raise _refuse(step, f"the low-rank term of {role}", "ship it as a LoRA file beside the base model")
        if kind in ("attn_out_bias", "ffn_out_bias") and np.any(values):
            raise _refuse(step, kind, "the architecture has no place for it")


def _gains(step: Step, parameters: ParameterSet, numbers: Hyperparameters, normed: bool) -> dict[str, np.ndarray]:
    """What each tensor of the step's layer is multiplied with, by its name behind `blk.N.`; per row or element."""
    _check_parameters(step, parameters)
    one = np.ones(numbers.width)
    gains: dict[str, np.ndarray] = {}
    for role, part, gate, out in (
        ("attn_output", ATTENTION, "gate_attn", "attn_out_gain"),
        ("ffn_down", FFN, "gate_ffn", "ffn_out_gain"),
    ):
        factor = one * parameters.get(gate, one[:1]) * parameters.get(out, one)
        factor = factor if step.parts & part else 0.0 * one
        gains |= {f"{role}.weight": factor, f"{role}.bias": factor}
    for role in ("attn_norm", "ffn_norm"):
        gains[f"{role}.weight"] = one * parameters.get(f"{role}_gain", one)
    if "ffn_hidden_gain" in parameters:
        gains["ffn_up.weight"] = _rows(parameters["ffn_hidden_gain"], 1)
    if "q_head_gain" in parameters:
        gains |= _query_gains(step, parameters["q_head_gain"], numbers, normed)
    return {name: gain for name, gain in gains.items() if np.any(gain != 1.0)}


def _layer(step: Step, index: int, tensors: list[Outgoing], gains: Mapping[str, np.ndarray]) -> list[Outgoing]:
    prefix = f"blk.{step.layer}."
    made = []
    for tensor in tensors:
        name = tensor.name.removeprefix(prefix)
        gain = gains.get(name)
        if gain is not None and tensor.feature is not None:
            raise RondelError(f"--materialize: a gain cannot be folded into {tensor.name} ({tensor.format})")
        made.append(replace(tensor, name=f"blk.{index}.{name}", gain=gain))
    return made


def materialize(source: Checkpoint, tensors: list[Outgoing]) -> Expanded:
    """The tensors of the expanded path, one layer a step; those of the model itself where nothing is replicated."""
    numbers = source.numbers
    record: dict[str, Any] = source.manifest.get("replication") or {}
    found, _ = decode_replication(record, numbers)
    if found is None:
        return Expanded(tensors, list(range(numbers.layers)))
    _check_steps(found)
    normed = block_tensor(0, "attn_q_norm") in source
    blocks: dict[int, list[Outgoing]] = {layer: [] for layer in range(numbers.layers)}
    before: list[Outgoing] = []
    after: list[Outgoing] = []
    for tensor in tensors:
        if tensor.name.startswith("blk."):
            blocks[int(tensor.name.split(".")[1])].append(tensor)
        else:
            (after if tensor.name.startswith("output") else before).append(tensor)
    layers = [
        made
        for index, step in enumerate(found.steps)
        for made in _layer(step, index, blocks[step.layer], _gains(step, found.parameters(step), numbers, normed))
    ]
    return Expanded([*before, *layers, *after], [step.layer for step in found.steps])
