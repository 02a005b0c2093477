"""Replicate: layers that run more than once on shared weights, each copy with parameters of its own.

A plan is explicit, one specification a layer:

    LAYER:MODE:COPIES[:OPTION]...      2:serial:1    5:parallel:2:mean    3:serial:1:ffn:0.25

MODE is `serial` (a copy runs on what the layer made) or `parallel` (it runs on what the layer read, and the residual is
added once). COPIES counts the executions beyond the first. Options in any order: a merge for parallel copies (`sum`,
`mean`, `weighted_sum`; the default is `mean`), the parts that a copy runs (`block`, `attn`, `ffn`; the default is the
whole block), a gate (`0.25` or `gate=0.25`), and a gain on what the copy adds (`gain=0.9`, an output gain per channel).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rondel.converters.checkpoint import Checkpoint, check_runs, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import Hyperparameters
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
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
from rondel.converters.replication_codec import encode_replication
from rondel.converters.replication_keys import base_sha256
from rondel.quant.stage import stage_record
from rondel.quant.workers import check_device

MODES = ("serial", "parallel")
PARTS = {"block": BLOCK, "attn": ATTENTION, "ffn": FFN}
# A copy that nobody fitted must leave the model as it was. Copies of a mean do so at 1; a serial copy or a sum harms in
# proportion to its gate: measured on a small 2-bit model, under 0.005 nats at 0.1 and 0.05 to 0.25 nats at 1.
MEAN_GATE, ADDED_GATE = 1.0, 0.1
NOTHING_CHOSEN = (
    "no layer was replicated: the automatic choice is not built yet, and copies that nobody fitted do not repair "
    "rounding errors; name layers with --layer LAYER:MODE:COPIES"
)


@dataclass(frozen=True)
class ReplicateConfig:
    """Which layers run more than once, and how."""

    layers: tuple[str, ...] = ()  # specifications, see above; none: the automatic choice
    gate: float | None = None  # of copies whose specification has none; None: 1 in a mean, else 0.1
    kv: Literal["own", "shared"] | None = None  # keys and values of copies; None: own if serial, shared if parallel
    strict: bool = False  # refuse readers that would run the base path alone
    target: str | None = None


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


def _specifications(config: ReplicateConfig, layers: int) -> dict[int, list[Specification]]:
    """The specifications by layer, a parallel one first."""
    found: dict[int, list[Specification]] = {}
    for text in config.layers:
        parsed = parse_specification(text, config.gate)
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


def build_replication(config: ReplicateConfig, numbers: Hyperparameters, base_sha256: str = "") -> Replication | None:
    """The steps of an explicit plan; None where no layer is named."""
    chosen = _specifications(config, numbers.layers)
    if not chosen:
        return None
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
        for one in chosen.get(layer, []):
            sets.append(_parameters(one, numbers))
            own = (config.kv or ("own" if one.mode == "serial" else "shared")) == "own"
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
    return Replication(
        numbers.layers, tuple(steps), tuple(merges), tuple(sets), strict=config.strict, base_sha256=base_sha256
    )


def redundant(one: Specification) -> bool:
    """Whether parallel copies compute what their layer computes: they fold into one gain, and cost time for nothing."""
    same_input = one.parts == ATTENTION or (one.parts == BLOCK and one.gate * one.gain == 1.0)
    return one.mode == "parallel" and same_input


def _base_sha256(source: Checkpoint, layers: Iterable[int]) -> str:
    """The hash of all tensors of the replicated layers: parameters fitted to them are bound to them."""
    source.fingerprint()  # an HF folder knows its tensors' hashes from then on
    return base_sha256({name: source.info(name).sha256 for name in source.names()}, layers)


def _check(source: Checkpoint, config: ReplicateConfig) -> None:
    check_runs(source, "replicated")
    if source.manifest.get("replication"):
        raise RondelError(f"{source.root}: is replicated already; replicate the folder that it was made from")
    if config.gate is not None and not abs(config.gate) <= float(np.finfo(np.float16).max):
        raise RondelError(f"--gate must be a float16 number, got {config.gate!r}")
    target = config.target or source.manifest.get("target")
    if config.strict and target == "llama.cpp":
        raise RondelError("--strict: llama.cpp runs the base path alone; use --target rondel")


def plan(source: Checkpoint, config: ReplicateConfig, teacher: Checkpoint | None = None) -> dict[str, Any]:
    """What replicate would write: layers, steps, KV caches, parameter bytes, and notes for the user."""
    _check(source, config)
    numbers = source.numbers
    built = build_replication(config, numbers)
    if built is None:
        return {"layers": [], "steps": numbers.layers, "kv_slots": numbers.layers, "notes": [NOTHING_CHOSEN]}
    chosen = [one for ones in _specifications(config, numbers.layers).values() for one in ones]
    part_names = {bits: name for name, bits in PARTS.items()}
    notes = [
        f"layer {one.layer}: these parallel copies are algebraically redundant, they fold into one gain of the layer"
        for one in chosen
        if redundant(one)
    ]
    return {
        "layers": [asdict(one) | {"parts": part_names[one.parts]} for one in chosen],
        "steps": len(built.steps),
        "kv_slots": built.slots(),
        "parameter_bytes": sum(2 * values.size for parameters in built.sets for values in parameters.values()),
        "notes": notes,
    }


def replicate(
    source: Checkpoint,
    out: Path,
    config: ReplicateConfig,
    teacher: Checkpoint | None = None,
    *,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Record the steps of `config` in a checkpoint whose tensors are those of `source`, linked where the disk allows.

    The automatic choice answers "none" for now, without asking the teacher: the result then has no replication, its
    record says why, and the chain goes on. Nothing is computed, so `threads` and `device` change nothing.
    """
    check_device(device)
    _check(source, config)
    numbers = source.numbers
    layers = sorted(_specifications(config, numbers.layers))
    built = build_replication(config, numbers, _base_sha256(source, layers) if layers else "")
    keys = encode_replication(built, numbers) if built else {}
    output = StageOutput(out, stage_record("replicate", config, source=source), force=force)
    if output.finished:
        return open_checkpoint(out)
    shards = source.shards()
    for done, (shard, names) in enumerate(shards.items()):
        progress(done, len(shards), shard)
        if not output.done(shard):
            output.take(shard, source, names)
    progress(len(shards), len(shards), "done")
    manifest = source.carried()
    if config.target:
        manifest["target"] = config.target
    if keys:
        manifest["replication"] = keys
    manifest["stages"] = [*source.stages, {**output.stage, "result": plan(source, config, teacher)}]
    output.finish(list(shards), manifest, source.side_files())
    return open_checkpoint(out)
