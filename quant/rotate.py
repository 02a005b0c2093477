"""Owns the rotate stage: randomized Hadamard changes of basis that leave the model's function as it is.

R1 turns the residual stream and R2 the channels of each head, both fused into the weights; R3 turns queries and keys
and R4 the hidden layer online, for the rondel target (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). Latent
attention adds its latents and what its heads hold without RoPE, fused. All in float64, stored as F32.

A rotation maps a row vector x of its site to H (s o x) / sqrt(block). The same map is applied to every row of the
matrices that read the site and to every column of those that write it: scalar products stay what they were.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import OUTPUT
from rondel.converters.folder import read_manifest, sha256_of
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.converters.rotation import GAINS, MATRICES
from rondel.converters.stats import MOVED, Stats
from rondel.quant.fold import folded_norms
from rondel.quant.rotate_checks import validate
from rondel.quant.rotate_config import RotateConfig, resolved_target, unties_head
from rondel.quant.rotated_stats import MovedStats
from rondel.quant.rotation_choice import BOTH, ROTATE, check_choice, choose
from rondel.quant.rotation_search import Found, RotationSearch, planned
from rondel.quant.rotator import Rotator
from rondel.quant.stage import stage_record
from rondel.quant.workers import Workers, check_device

__all__ = ["RotateConfig", "plan", "rotate"]

FLOAT32_BYTES = 4
CHOICE = "choice"  # of the journal alone: an interrupted run does not measure again
TURNED = (ROTATE, BOTH)


def _shards(source: Checkpoint, config: RotateConfig) -> dict[str, list[str]]:
    """The tensors of the output by shard: the source's, and a head of its own once the residual stream turns."""
    shards = source.shards()
    if unties_head(source, config):
        shards["output"] = [*shards["output"], OUTPUT]
    return shards


def before_statistics(config: RotateConfig) -> RotateConfig:
    """What of the settings can be checked while calibrate is still to run: no choice, no rotation made from text."""
    return replace(config, auto=None, kind="hadamard" if config.kind == "dfrot" else config.kind)


def plan(
    source: Checkpoint,
    config: RotateConfig,
    stats: Stats | None = None,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What rotate would do: rotations with their blocks and cost, folded norms, and the bytes of the tensors.

    With `auto` the choice is made; its table is in "choice".
    """
    rotations = validate(source, config, stats)
    choice = {}
    if config.auto is not None:
        with Workers(threads) as workers:
            choice = {"choice": _measure(source, config, stats, workers, progress=progress)}
    names = [name for shard in _shards(source, config).values() for name in shard]
    elements = sum(torch.Size(source.info(name if name in source else source.head()).shape).numel() for name in names)
    return {
        "stage": "rotate",
        "target": resolved_target(source, config),
        "rotations": [
            {
                "site": rotation.site,
                "seed": config.seed,
                "size": rotation.size,
                "online": rotation.online,
                **planned(source, config, rotation),
            }
            for rotation in rotations
        ],
        "folded_norms": len(folded_norms(source, rotations)),
        "unties_head": unties_head(source, config),
        "moves_statistics": stats is not None,
        "tries": config.tries,
        "tensors": len(names),
        "tensor_bytes": elements * FLOAT32_BYTES,
        **choice,
    }


def _measure(
    source: Checkpoint,
    config: RotateConfig,
    stats: Stats | None,
    workers: Workers,
    *,
    found: Found | None = None,
    progress: Progress,
) -> dict[str, Any]:
    check_choice(source, config, stats)
    assert stats is not None, "a choice without statistics was refused"
    found = found or RotationSearch(source, config, stats, workers).find(progress)
    return choose(source, config, stats, found.rotations, workers=workers, progress=progress)


def _leave(
    source: Checkpoint, output: StageOutput, manifest: dict[str, Any], stats: Stats | None, workers: Workers
) -> None:
    """Finish with the model and its statistics as they are."""
    shards = source.shards()
    for shard, names in shards.items():
        if not output.done(shard):
            output.take(shard, source, names)
    if stats is not None:
        MovedStats(source, stats, [], workers).write(output.partial, output.stage)
    (output.partial / f"{MATRICES}.safetensors").unlink(missing_ok=True)
    output.finish(list(shards), manifest, source.side_files())


def rotate(
    source: Checkpoint,
    out: Path,
    config: RotateConfig,
    stats: Stats | None = None,
    *,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Write the rotated model to `out`, all tensors F32; the function stays (1e-10 relative in float64 logits).

    `stats` (full second moments of the unrotated model) move into the new basis and are written to `out`/stats, where
    quantize finds them. With `auto` the model may be left as it is: the manifest's "rotation_choice" tells why. Raises
    RondelError for a rotated or quantized model and for what the family does not allow.
    """
    validate(source, config, stats)
    check_choice(source, config, stats)
    check_device(device)
    target = resolved_target(source, config)
    record = stage_record("rotate", config, source=source, stats=stats)
    beside = (MOVED, f"{MATRICES}.safetensors", f"{GAINS}.safetensors")
    output = StageOutput(out, record, force=force, beside=beside)
    if output.finished:
        return Checkpoint(out, read_manifest(out))
    shards = _shards(source, config)
    total = len(shards) + (stats is not None)
    manifest = {
        **source.carried(),
        **({"target": target} if target else {}),
        "stages": [*source.stages, record],
    }
    with Workers(threads) as workers:
        found = RotationSearch(source, config, stats, workers, device).kept(output, progress)
        rotations = found.rotations
        if config.auto is not None:
            if not output.done(CHOICE):
                output.write(CHOICE, {}, _measure(source, config, stats, workers, found=found, progress=progress))
            manifest["rotation_choice"] = output.result(CHOICE)
            if manifest["rotation_choice"]["chosen"] not in TURNED:
                _leave(source, output, manifest, stats, workers)
                return Checkpoint(out, read_manifest(out))
        rotator = Rotator(source, rotations, workers, device=device)
        for done, (shard, names) in enumerate(shards.items()):
            progress(done, total, shard)
            if not output.done(shard):
                output.write(shard, {name: rotator.tensor(name) for name in names})
        if stats is not None:
            progress(len(shards), total, "statistics")
            MovedStats(source, stats, rotations, workers).write(output.partial, record)
        gains = {name: source.read(name) for name in sorted(rotator.folded)}
        if gains and not output.done(GAINS):
            output.write(GAINS, gains)
    progress(total, total, "done")
    numbers = manifest["hyperparameters"]
    manifest |= {
        "hyperparameters": {**numbers, "tied": numbers["tied"] and not unties_head(source, config)},
        "rotations": [rotation.to_json() for rotation in rotations],
        # What undoing it needs.
        "folded": {
            "norms": {name: sha256_of(gain) for name, gain in gains.items()},
            "untied": unties_head(source, config),
            "fixed_target": "target" not in source.manifest and target is not None,
        },
        **({"rotation_search": found.told} if found.told else {}),
    }
    output.finish(list(shards), manifest, source.side_files())
    return Checkpoint(out, read_manifest(out))
