"""Replicate: layers that run more than once on shared weights, each copy with parameters of its own.

A plan is explicit, one specification a layer (see replication_plan.py), or chosen (selection.py), where there is a
teacher and text. Then the single copy is tuned, and copies are fitted, judged and compared (replication_outcome.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rondel.converters.checkpoint import Checkpoint, check_runs, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.lora import write_lora
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.converters.replication_codec import encode_replication
from rondel.converters.replication_keys import base_sha256
from rondel.quant.choice_config import ChoiceConfig
from rondel.quant.replaced_view import ReplacedView
from rondel.quant.replicate_config import ReplicateConfig
from rondel.quant.replication_cost import stored_bytes
from rondel.quant.replication_outcome import decide
from rondel.quant.replication_plan import (
    PARTS,
    Specification,
    build_replication,
    parse_specification,
    redundant,
    specifications,
)
from rondel.quant.replication_trial import windows_of
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
    "no layer is replicated: layers are chosen by --teacher and --text, or named with --layer LAYER:MODE:COPIES"
)
CORRECTION = "low-rank.gguf"  # beside the tensors
NOT_FITTED = "the copies are not fitted, and such copies do not repair rounding errors: give --teacher and --text"


def _base_sha256(model: Checkpoint, layers: Iterable[int]) -> str:
    """The hash of all tensors of the replicated layers: parameters fitted to them are bound to them."""
    return base_sha256({name: model.info(name).sha256 for name in model.names()}, layers)


def _check(source: Checkpoint, config: ReplicateConfig, teacher: Checkpoint | None, text: Sequence[Path]) -> None:
    check_runs(source, "replicated")
    if text and teacher is None:
        raise RondelError("--text: copies are fitted to a teacher; give the unquantized model with --teacher")
    if config.layers and config.mode != "auto":
        raise RondelError(f"--mode {config.mode}: is for copies that are chosen; --layer names them and their modes")
    ChoiceConfig.of(config).check(source.numbers.layers)
    if config.tune and not (teacher and text):
        raise RondelError("--tune: the single copy is tuned towards a teacher; give --teacher and --text")
    if config.prefer == "low-rank" and not (teacher and text):
        raise RondelError("--prefer low-rank: the correction is fitted to a teacher; give --teacher and --text")
    if source.manifest.get("replication"):
        raise RondelError(f"{source.root}: is replicated already; replicate the folder that it was made from")
    if config.gate is not None and not abs(config.gate) <= float(np.finfo(np.float16).max):
        raise RondelError(f"--gate must be a float16 number, got {config.gate!r}")
    target = config.target or source.manifest.get("target")
    if config.strict and target == "llama.cpp":
        raise RondelError("--strict: llama.cpp runs the base path alone; use --target rondel")


def plan(
    source: Checkpoint, config: ReplicateConfig, teacher: Checkpoint | None = None, text: Sequence[Path] = ()
) -> dict[str, Any]:
    """What replicate would write: layers, steps, KV caches, parameter bytes, and notes for the user."""
    _check(source, config, teacher, text)
    numbers = source.numbers
    built = build_replication(config, numbers)
    if built is None:
        told = {"layers": [], "steps": numbers.layers, "kv_slots": numbers.layers, "notes": [NOTHING_CHOSEN]}
        if teacher and text:
            chosen_from = ChoiceConfig.of(config)
            candidates = [] if config.mode == "none" else chosen_from.copies(numbers.layers)
            told |= {"candidates": [str(copy) for copy in candidates], "notes": []}
        return told
    chosen = [one for ones in specifications(config, numbers.layers).values() for one in ones]
    part_names = {bits: name for name, bits in PARTS.items()}
    notes = [
        f"layer {one.layer}: these parallel copies are algebraically redundant, they fold into one gain of the layer"
        for one in chosen
        if redundant(one) and not text
    ]
    if teacher and not text:
        notes.append(NOT_FITTED)
    return {
        "layers": [asdict(one) | {"parts": part_names[one.parts]} for one in chosen],
        "steps": len(built.steps),
        "kv_slots": built.slots(),
        "parameter_bytes": stored_bytes(built),
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

    With a teacher and text, tensors that the tuning changed are written anew, in the same formats and bytes. Where no
    layer is named, copies are chosen, or none: the record says so, and the chain goes on. Raises RegressionError for
    named copies that harm.
    """
    check_device(device)
    _check(source, config, teacher, text)
    built = build_replication(config, source.numbers)
    seen = windows_of(source, text, config) if teacher and text else None
    inputs = {"teacher": teacher.fingerprint(), "text": seen.sha256()} if seen and teacher else {}
    output = StageOutput(
        out, stage_record("replicate", config, source=source, **inputs), force=force, beside=[CORRECTION]
    )
    if output.finished:
        return open_checkpoint(out)
    result, model = plan(source, config, teacher, text), source
    if seen and teacher:
        try:
            outcome = decide(source, teacher, seen, built, config, threads=threads, device=device, progress=progress)
            if outcome.correction:
                name = f"low-rank correction of {source.manifest['source']['name']}"
                write_lora(output.partial / CORRECTION, source.family.name, outcome.correction, name)
                outcome.told["correction"]["file"] = CORRECTION
        except RondelError:
            output.abandon()
            raise
        model, built = outcome.model, outcome.replication
        result |= outcome.told | {"notes": [*result["notes"], *outcome.told["notes"]]}
    if built:
        copied = sorted({step.layer for step in built.steps if step.number})
        built = replace(built, base_sha256=_base_sha256(model, copied))
    shards = source.shards()
    for done, (shard, names) in enumerate(shards.items()):
        progress(done, len(shards), shard)
        if not output.done(shard):
            changed = isinstance(model, ReplacedView) and model.changed(names)
            output.take(shard, model if changed else source, names)
    progress(len(shards), len(shards), "done")
    manifest = source.carried()
    if config.target:
        manifest["target"] = config.target
    if built:
        manifest["replication"] = encode_replication(built, source.numbers)
    manifest["stages"] = [*source.stages, {**output.stage, "result": result}]
    output.finish(list(shards), manifest, source.side_files())
    return open_checkpoint(out)
