"""Replicate: layers that run more than once on shared weights, each copy with parameters of its own.

A plan is explicit, one specification a layer (see replication_plan.py), or chosen by what it does to text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rondel.converters.checkpoint import Checkpoint, check_runs, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.converters.replication_codec import encode_replication
from rondel.converters.replication_keys import base_sha256
from rondel.quant.replication_plan import (
    PARTS,
    Specification,
    build_replication,
    named_layers,
    parse_specification,
    redundant,
    specifications,
)
from rondel.quant.stage import stage_record
from rondel.quant.workers import check_device

__all__ = [
    "ReplicateConfig",
    "Specification",
    "build_replication",
    "parse_specification",
    "plan",
    "replicate",
]

NOTHING_CHOSEN = (
    "no layer was replicated: the automatic choice needs --teacher and --text, and copies that nobody fitted do not "
    "repair rounding errors; or name layers with --layer LAYER:MODE:COPIES"
)
NOT_FITTED = "the copies are not fitted: give --teacher and --text for that"


@dataclass(frozen=True)
class ReplicateConfig:
    """Which layers run more than once, and how; without a teacher and text only `layer` has a meaning."""

    layer: tuple[str, ...] = ()  # specifications, see replication_plan.py; none: the automatic choice
    mode: Literal["auto", "serial", "parallel", "mixed", "none"] = "auto"  # none: the single copy is tuned alone
    layers: str = "auto"  # which of them may be chosen: auto (all), "2,5,8-11"; with a mode they are taken
    parts: Literal["auto", "block", "ffn", "attn"] = "auto"
    passes: int = 2  # executions of a layer, the first one counted
    merge: Literal["sum", "mean", "weighted_sum"] | None = None  # of parallel copies; None: sum, where they are fitted
    kv: Literal["own", "shared"] | None = None  # keys and values of copies; None: own if serial, shared if parallel
    gate: float | None = None  # of copies whose specification has none; None: 1 in a mean, else 0.1; fitted: 0
    search: Literal["screen", "grid", "bayes", "evolve"] = "screen"
    budget_evals: int = 40  # candidates that a search measures at most
    max_layers: float = 0.25  # layers that may run more than once: a share below 1 (one always may), else a count
    max_compute: float = 1.25  # executions of all steps, over those of the layers
    max_kv: float = 1.25  # KV caches of all steps, over those of the layers
    context: int | None = None  # tokens of a window; None: 512, or the model's context where that is shorter
    tokens: int = 131072  # the most to fit, to choose and to decide with
    steps: int = 150  # of every optimization
    tune: bool = True  # scales and norms of the single copy first
    prefer: Literal["none", "replicate", "low-rank"] = "none"
    rank: int = 8  # of the correction that `prefer` low-rank writes
    allow_regression: bool = False
    strict: bool = False  # refuse readers that would run the base path alone
    seed: int = 0
    target: str | None = None


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
    named_layers(config.layers, source.numbers.layers)
    if config.layer and config.layers != "auto":
        raise RondelError("--layer and --layers: the first names copies, the second where to look for them; give one")
    target = config.target or source.manifest.get("target")
    if config.strict and target == "llama.cpp":
        raise RondelError("--strict: llama.cpp runs the base path alone; use --target rondel")


def plan(
    source: Checkpoint, config: ReplicateConfig, teacher: Checkpoint | None = None, text: Sequence[Path] = ()
) -> dict[str, Any]:
    """What replicate would write: layers, steps, KV caches, parameter bytes, and notes for the user."""
    _check(source, config)
    numbers = source.numbers
    built = build_replication(config, numbers)
    if built is None:
        return {"layers": [], "steps": numbers.layers, "kv_slots": numbers.layers, "notes": [NOTHING_CHOSEN]}
    chosen = [one for ones in specifications(config, numbers.layers).values() for one in ones]
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
    text: Sequence[Path] = (),
    *,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Record the steps of `config` in a checkpoint whose tensors are those of `source`, linked where the disk allows.

    Without `text` nothing is fitted and the automatic choice answers "none": the result then has no replication, its
    record says why, and the chain goes on.
    """
    check_device(device)
    _check(source, config)
    numbers = source.numbers
    layers = sorted(specifications(config, numbers.layers))
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
    manifest["stages"] = [*source.stages, {**output.stage, "result": plan(source, config, teacher, text)}]
    output.finish(list(shards), manifest, source.side_files())
    return open_checkpoint(out)
