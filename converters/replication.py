"""The replication of a model as steps and parameter sets, and its GGUF keys (formats.md, section 4), both ways.

A step runs one layer, or one of its parts, on the residual stream. Pass 0 of the steps is the model itself; the passes
after it are copies that share the layer's weights and differ by their parameters. Every rule of the format is checked
in `check`, on what is written as on what is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from rondel.converters.errors import RondelError
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.replication_kinds import (
    KINDS,
    LOW_RANK,
    WHOLE_RANGES,
    ParameterSet,
    attention_input,
    kind_shape,
    rank_limit,
)

VERSION = (1, 0, 0)
ATTENTION, FFN = 1, 2  # bits of a step's parts
BLOCK = ATTENTION | FFN
NO_SLOT = -1  # the KV slot of a step without attention
MERGES = ("none", "sum", "mean", "weighted_sum")  # by number; "none" for a step that is alone in its group
STEPS_LIMIT = 65536
PASS_LIMIT = 255


@dataclass(frozen=True)
class Step:
    """One execution of a layer."""

    layer: int
    number: int  # the pass: 0 = the base, 1.. = copies
    group: int  # steps of one group see the same input, and the residual is added once
    slot: int  # KV slot: a new number is a cache of its own, an earlier one is read; NO_SLOT without attention
    parts: int = BLOCK
    parameters: int = 0  # index into the sets, from 1; 0 = none


@dataclass(frozen=True)
class Replication:
    """The expanded path of a model. `layer_sets` are inherited by the copies of a layer, one index a layer."""

    layers: int
    steps: tuple[Step, ...]
    merges: tuple[int, ...]  # one a group, index into MERGES
    sets: tuple[ParameterSet, ...] = ()
    layer_sets: tuple[int, ...] = ()
    strict: bool = False  # the base path alone is not acceptable
    base_sha256: str = ""  # of the tensors of the replicated layers
    evaluation: Mapping[str, float | int | str | bool] = field(default_factory=dict)  # what was measured

    def parameters(self, step: Step) -> ParameterSet:
        """What a step changes about its layer: the copy's values over the layer's; the base pass changes nothing."""
        if step.number == 0:
            return {}
        inherited = self.layer_sets[step.layer] if self.layer_sets else 0
        return {**self._set(inherited), **self._set(step.parameters)}

    def _set(self, index: int) -> ParameterSet:
        return self.sets[index - 1] if index else {}

    def slots(self) -> int:
        """The number of KV caches."""
        return max(step.slot for step in self.steps) + 1


def _refuse(what: str) -> RondelError:
    return RondelError(f"replication: {what}; make the file again with rondel replicate")


def _check_base_path(found: Replication) -> None:
    base = [step for step in found.steps if step.number == 0]
    if [step.layer for step in base] != list(range(found.layers)) or any(step.parts != BLOCK for step in base):
        raise _refuse(f"pass 0 must be the whole layers 0 to {found.layers - 1} in order")
    if any(step.parameters for step in base):
        raise _refuse("a step of pass 0 has parameters, the base path must be the model itself")
    last = dict.fromkeys(range(found.layers), -1)
    for index, step in enumerate(found.steps):
        if step.number != last[step.layer] + 1:
            raise _refuse(f"step {index} is pass {step.number} of layer {step.layer}, expected {last[step.layer] + 1}")
        last[step.layer] = step.number


def _check_groups(found: Replication) -> None:
    runs = [(group, len(list(steps))) for group, steps in groupby(found.steps, key=lambda step: step.group)]
    if [group for group, _ in runs] != list(range(len(runs))):
        raise _refuse("step.group must count 0, 1, 2, ... in contiguous runs")
    if len(found.merges) != len(runs):
        raise _refuse(f"group.merge has {len(found.merges)} elements, expected {len(runs)}, one a group")
    for group, size in runs:
        if (size > 1) != (found.merges[group] != 0):
            raise _refuse(f"group {group} has {size} steps and the merge {MERGES[found.merges[group]]}")


def _check_slots(found: Replication) -> None:
    owner: list[Step] = []  # the step that fills a slot
    for index, step in enumerate(found.steps):
        if not step.parts & ATTENTION:
            if step.slot != NO_SLOT:
                raise _refuse(f"step {index} has no attention and the KV slot {step.slot}, expected {NO_SLOT}")
        elif step.slot == len(owner):
            owner.append(step)
        elif not 0 <= step.slot < len(owner) or step.number == 0 or owner[step.slot].layer != step.layer:
            raise _refuse(
                f"step {index} has the KV slot {step.slot}, expected the new slot {len(owner)} "
                f"or, for a copy, one that layer {step.layer} filled before"
            )
        else:
            _check_shared_slot(found, index, owner[step.slot])


def _check_shared_slot(found: Replication, index: int, owner: Step) -> None:
    """A reader that would have made other keys and values than it reads needs a slot of its own.

    Only a later group may attend to earlier keys by choice: its own input is another one in any case.
    """
    own, read = (attention_input(found.parameters(step)) for step in (found.steps[index], owner))
    together = found.steps[index].group == owner.group
    for kind in own.keys() | read.keys() if together else [kind for kind in own if kind[:6] in ("attn_k", "attn_v")]:
        if kind not in own or kind not in read or not np.array_equal(own[kind], read[kind]):
            raise _refuse(
                f"step {index} reads the keys and values of KV slot {owner.slot}, which were made without its {kind}; "
                "give it a slot of its own"
            )


def _check_values(index: int, kind: str, values: np.ndarray, numbers: Hyperparameters) -> None:
    """One parameter: its shape, and that the file can hold its values."""
    if kind not in KINDS:
        raise _refuse(f"parameter set {index} has the unknown kind {kind!r}")
    rank_axis = {"left": 1, "right": 0}.get(KINDS[kind].dimension)
    rank = values.shape[rank_axis] if rank_axis is not None and values.ndim == 2 else 1
    expected = kind_shape(kind, numbers, max(rank, 1))
    if values.shape != expected:
        raise _refuse(
            f"{kind} of parameter set {index} has {values.size} values, expected {' x '.join(map(str, expected))}"
        )
    if rank_axis is not None and rank > rank_limit(kind, numbers):
        raise _refuse(
            f"{kind} of parameter set {index} has the rank {rank}, at most {rank_limit(kind, numbers)} is useful"
        )
    if kind in WHOLE_RANGES:
        low, high = WHOLE_RANGES[kind]
        if not low <= values[0] <= high or values[0] != np.rint(values[0]):
            raise _refuse(f"{kind} of parameter set {index} is {values[0]}, expected a whole number {low} to {high}")
    if not np.all(np.abs(values) <= float(np.finfo(np.float16).max)):
        raise _refuse(f"{kind} of parameter set {index} has a value that is no float16 number")
    if kind in ("act_scale", "act_clip") and not np.float16(values[0]) > 0:
        raise _refuse(f"{kind} of parameter set {index} is {values[0]}, expected a float16 number above 0")


def _check_step_values(index: int, step: Step, values: ParameterSet) -> None:
    """What a step resolves to: gates of its own for a copy, and both halves of every low-rank term."""
    needed = [name for name, part in (("gate_attn", ATTENTION), ("gate_ffn", FFN)) if step.parts & part]
    missing = [name for name in needed if step.number > 0 and name not in values]
    if missing:
        raise _refuse(f"step {index} (pass {step.number} of layer {step.layer}) has no {missing[0]}")
    for role in LOW_RANK:
        left, right = values.get(f"{role}_left"), values.get(f"{role}_right")
        if (left is None) != (right is None):
            raise _refuse(f"step {index} has one half of the low-rank term of {role}, expected left and right")
        if left is not None and right is not None and left.shape[1] != right.shape[0]:
            raise _refuse(f"step {index} has ranks {left.shape[1]} and {right.shape[0]} in the low-rank term of {role}")


def _check_sets(found: Replication, numbers: Hyperparameters) -> None:
    for index, parameters in enumerate(found.sets, start=1):
        for kind, values in parameters.items():
            _check_values(index, kind, values, numbers)
    if found.layer_sets and len(found.layer_sets) != found.layers:
        raise _refuse(f"layer.pset has {len(found.layer_sets)} elements, expected {found.layers}")
    if any(not 0 <= index <= len(found.sets) for index in (*found.layer_sets, *(s.parameters for s in found.steps))):
        raise _refuse(f"a parameter set beyond the last, {len(found.sets)}, is named")
    for index, step in enumerate(found.steps):
        _check_step_values(index, step, found.parameters(step))


def check(found: Replication, numbers: Hyperparameters) -> None:
    """Refuse, in one sentence, a replication that breaks a rule of the format."""
    if found.layers != numbers.layers:
        raise _refuse(f"n_base is {found.layers}, the model has {numbers.layers} layers")
    if not found.layers <= len(found.steps) <= STEPS_LIMIT:
        raise _refuse(f"{len(found.steps)} steps, expected {found.layers} to {STEPS_LIMIT}")
    for index, step in enumerate(found.steps):
        if not 0 <= step.layer < found.layers:
            raise _refuse(f"step {index} runs layer {step.layer}, the last is {found.layers - 1}")
        if not 0 <= step.number <= PASS_LIMIT:
            raise _refuse(f"step {index} has the pass {step.number}, the largest is {PASS_LIMIT}")
        if not 1 <= step.parts <= BLOCK:
            raise _refuse(f"step {index} has the parts {step.parts}, expected {ATTENTION}, {FFN} or {BLOCK}")
    if any(not 0 <= merge < len(MERGES) for merge in found.merges):
        raise _refuse(f"group.merge holds a number beyond {len(MERGES) - 1} ({MERGES[-1]})")
    _check_base_path(found)
    _check_groups(found)
    _check_sets(found, numbers)
    _check_slots(found)


def mirror(found: Replication) -> str:
    """The human mirror of the arrays, as JSON: `copies` counts the executions beyond the first."""
    layers: dict[str, dict[str, Any]] = {}
    for layer in range(found.layers):
        copies = [step for step in found.steps if step.layer == layer and step.number > 0]
        base = next(step for step in found.steps if step.layer == layer and step.number == 0)
        parallel = [step for step in copies if step.group == base.group]
        if copies:
            kind = "parallel" if len(parallel) == len(copies) else "mixed" if parallel else "serial"
            told: dict[str, Any] = {"type": kind, "copies": len(copies), "shared_weight": True}
            if parallel:
                told["merge_strategy"] = MERGES[found.merges[base.group]]
            layers[f"layer_{layer}"] = told
    return json.dumps(layers, separators=(",", ":"))
