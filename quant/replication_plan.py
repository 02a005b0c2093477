"""The grammar of explicit plans, and the steps that a plan makes. One specification a layer:

    LAYER:MODE:COPIES[:OPTION]...      2:serial:1    5:parallel:2:mean    3:serial:1:ffn:0.25

MODE is `serial` (a copy runs on what the layer made) or `parallel` (it runs on what the layer read, and the residual is
added once). COPIES counts the executions beyond the first. Options in any order: a merge for parallel copies (`sum`,
`mean`, `weighted_sum`; the default is `mean`), the parts that a copy runs (`block`, `attn`, `ffn`; the default is the
whole block), a gate (`0.25` or `gate=0.25`), and a gain on what the copy adds (`gain=0.9`, an output gain per channel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from rondel.converters.errors import RondelError
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.replication import (
    ATTENTION,
    BLOCK,
    FFN,
    MERGES,
    NO_SLOT,
    PASS_LIMIT,
    ParameterSet,
    Replication,
    Step,
)

MODES = ("serial", "parallel")
PARTS = {"block": BLOCK, "attn": ATTENTION, "ffn": FFN}
# A copy that nobody fitted must leave the model as it was. Copies of a mean do so at 1; a serial copy or a sum harms in
# proportion to its gate: measured on a small 2-bit model, under 0.005 nats at 0.1 and 0.05 to 0.25 nats at 1.
MEAN_GATE, ADDED_GATE = 1.0, 0.1


class Plan(Protocol):
    """What of a ReplicateConfig an explicit plan consists of."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Specifications."""
        ...

    @property
    def gate(self) -> float | None:
        """Of copies whose specification has none."""
        ...

    @property
    def kv(self) -> Literal["own", "shared"] | None:
        """Whose keys and values copies use."""
        ...

    @property
    def strict(self) -> bool:
        """Whether readers must run the copies."""
        ...


@dataclass(frozen=True)
class Specification:
    """One parsed specification."""

    layer: int
    mode: str
    copies: int
    merge: str  # "none" for serial copies
    parts: int
    gate: float
    gain: float


def _number(text: str, specification: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= float(np.finfo(np.float16).max):
        raise RondelError(f"--layer {specification}: {what} must be a float16 number, got {text!r}")
    return value


def parse_specification(text: str, default_gate: float | None = None) -> Specification:
    """LAYER:MODE:COPIES[:OPTION]... as a Specification; anything else is refused with the grammar."""
    fields = text.split(":")
    if len(fields) < 3 or not fields[0].isdecimal() or fields[1] not in MODES or not fields[2].isdecimal():
        raise RondelError(
            f"--layer {text}: expected LAYER:MODE:COPIES[:OPTION]... such as 2:serial:1 or 5:parallel:2:mean"
        )
    layer, copies = int(fields[0]), int(fields[2])
    if not 1 <= copies <= PASS_LIMIT:
        raise RondelError(f"--layer {text}: COPIES must be 1 to {PASS_LIMIT}, got {copies}")
    told: dict[str, Any] = {}
    for option in fields[3:]:
        name, _, value = option.rpartition("=")
        key: str
        chosen: str | int | float
        if option in MERGES[1:]:
            key, chosen = "merge", option
        elif option in PARTS:
            key, chosen = "parts", PARTS[option]
        elif name in ("", "gate") or name == "gain":
            key = name or "gate"
            chosen = _number(value, text, key)
        else:
            raise RondelError(f"--layer {text}: {option!r} is no merge, part, gate= or gain=")
        if key in told:
            raise RondelError(f"--layer {text}: {key} is given twice")
        told[key] = chosen
    serial = fields[1] == "serial"
    if serial and "merge" in told:
        raise RondelError(f"--layer {text}: serial copies are not merged; leave out {told['merge']}")
    merge, parts = told.get("merge", "none" if serial else "mean"), told.get("parts", BLOCK)
    if merge == "mean" and parts != BLOCK:
        raise RondelError(f"--layer {text}: a mean of a whole block and a part of it halves the rest; use sum")
    gate = told.get("gate", default_gate)
    if gate is None:
        gate = MEAN_GATE if merge == "mean" else ADDED_GATE
    return Specification(layer, fields[1], copies, merge, parts, gate, told.get("gain", 1.0))


def specifications(plan: Plan, layers: int) -> dict[int, list[Specification]]:
    """The specifications of a plan by layer, a parallel one first; `layers`: how many the model has."""
    found: dict[int, list[Specification]] = {}
    for text in plan.layers:
        parsed = parse_specification(text, plan.gate)
        if parsed.layer >= layers:
            raise RondelError(f"--layer {text}: the model has the layers 0 to {layers - 1}")
        found.setdefault(parsed.layer, []).append(parsed)
    for layer, parsed_layer in found.items():
        if sum(one.mode == "parallel" for one in parsed_layer) > 1:
            raise RondelError(f"--layer: layer {layer} has two parallel specifications; give one with more copies")
        if sum(one.copies for one in parsed_layer) > PASS_LIMIT:
            raise RondelError(f"--layer: layer {layer} has more than {PASS_LIMIT} copies")
        parsed_layer.sort(key=lambda one: one.mode != "parallel")
    return found


def _parameters(one: Specification, numbers: Hyperparameters) -> ParameterSet:
    values: ParameterSet = {}
    for part, gate, gain in ((ATTENTION, "gate_attn", "attn_out_gain"), (FFN, "gate_ffn", "ffn_out_gain")):
        if one.parts & part:
            values[gate] = np.array([one.gate], np.float32)
            if one.gain != 1.0:
                values[gain] = np.full(numbers.width, one.gain, np.float32)
    return values


def assemble(
    chosen: Mapping[int, Sequence[Specification]],
    numbers: Hyperparameters,
    *,
    kv: Literal["own", "shared"] | None = None,
    strict: bool = False,
    base_sha256: str = "",
) -> Replication:
    """The steps of specifications by layer, each layer's parallel one first."""
    steps: list[Step] = []
    merges: list[int] = []
    sets: list[ParameterSet] = []
    slots = 0
    for layer in range(numbers.layers):
        base = Step(layer, 0, len(merges), slots)
        slots += 1
        steps.append(base)
        merges.append(0)
        number = 0
        for one in chosen.get(layer, ()):
            sets.append(_parameters(one, numbers))
            own = (kv or ("own" if one.mode == "serial" else "shared")) == "own"
            for _ in range(one.copies):
                number += 1
                if one.mode == "parallel":
                    merges[base.group] = MERGES.index(one.merge)
                else:
                    merges.append(0)
                slot = NO_SLOT if not one.parts & ATTENTION else slots if own else base.slot
                if slot == slots:
                    slots += 1
                steps.append(Step(layer, number, len(merges) - 1, slot, one.parts, len(sets)))
    return Replication(numbers.layers, tuple(steps), tuple(merges), tuple(sets), strict=strict, base_sha256=base_sha256)


def build_replication(plan: Plan, numbers: Hyperparameters, base_sha256: str = "") -> Replication | None:
    """The steps of an explicit plan; None where no layer is named."""
    chosen = specifications(plan, numbers.layers)
    if not chosen:
        return None
    return assemble(chosen, numbers, kv=plan.kv, strict=plan.strict, base_sha256=base_sha256)


def redundant(one: Specification) -> bool:
    """Whether parallel copies compute what their layer computes: they fold into one gain, and cost time for nothing."""
    same_input = one.parts == ATTENTION or (one.parts == BLOCK and one.gate * one.gain == 1.0)
    return one.mode == "parallel" and same_input
