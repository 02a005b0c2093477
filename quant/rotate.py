"""Owns the rotate stage: changes of basis that leave the model's function as it is, made where that pays.

R1 turns the residual stream and R2 the channels of each head, both fused into the weights; R3 turns queries and keys
and R4 the hidden layer online, for the rondel target (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). Latent
attention adds its latents and what its heads hold without RoPE, fused, RoPE its planes. Online rotations are randomized
Hadamards; fused ones may also be random orthogonal, or optimized for the weights or the activations. All in float64,
stored as F32.

A rotation maps a row vector x of its site to R(x), for a Hadamard H (s o x) / sqrt(block). The same map is applied to
every row of the matrices that read the site and to every column of those that write it: scalar products stay what they
were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import OUTPUT
from rondel.converters.folder import read_manifest, sha256_of
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.converters.rotation import GAINS, MATRICES, Rotation
from rondel.converters.stats import MOVED, Stats
from rondel.quant.fold import folded_norms
from rondel.quant.rotate_checks import check_unturned, validate
from rondel.quant.rotate_config import RotateConfig, resolved_target, unties_head
from rondel.quant.rotated_stats import MovedStats
from rondel.quant.rotation_choice import TURNED, check_choice, choose
from rondel.quant.rotation_search import Found, RotationSearch, planned
from rondel.quant.rotator import Rotator
from rondel.quant.stage import stage_record
from rondel.quant.workers import Workers, check_device

__all__ = ["RotateConfig", "plan", "rotate"]

FLOAT32_BYTES = 4
CHOICE = "choice"  # of the journal alone: an interrupted run does not measure again


@dataclass(frozen=True)
class _Run:
    """What a stage under way works with."""

    source: Checkpoint
    config: RotateConfig
    stats: Stats | None
    output: StageOutput
    workers: Workers
    device: str
    progress: Progress


def _shards(source: Checkpoint, *, untied: bool) -> dict[str, list[str]]:
    """The tensors of the output by shard: the source's, and a head of its own where the residual stream turns."""
    shards = source.shards()
    if untied:
        shards["output"] = [*shards["output"], OUTPUT]
    return shards


def before_statistics(config: RotateConfig) -> RotateConfig:
    """What of the settings can be checked while calibrate is still to run: no choice, no rotation made from text."""
    rotate = "always" if config.rotate == "auto" else config.rotate
    return replace(config, rotate=rotate, kind="hadamard" if config.kind == "dfrot" else config.kind)


def _checked(source: Checkpoint, config: RotateConfig, stats: Stats | None) -> list[Rotation]:
    """The rotations to start from, none where nothing is to turn; refuses all that can be refused."""
    if config.rotate != "never":
        rotations = validate(source, config, stats)
        check_choice(source, config, stats)
        return rotations
    check_unturned(source)
    if stats is not None:
        stats.check_basis(source)
    return []


def plan(
    source: Checkpoint,
    config: RotateConfig,
    stats: Stats | None = None,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What rotate would do: rotations with their blocks and cost, folded norms, and the bytes of the tensors.

    Where something is to be decided, it is: the table is in "choice".
    """
    rotations = _checked(source, config, stats)
    choice = {}
    if config.rotate == "auto":
        with Workers(threads) as workers:
            found = RotationSearch(source, config, stats, workers).find(progress).rotations if stats else None
            choice = {"choice": choose(source, config, stats, found, workers=workers, progress=progress)}
    untied = bool(rotations) and unties_head(source, config)
    names = [name for shard in _shards(source, untied=untied).values() for name in shard]
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
        "unties_head": untied,
        "moves_statistics": stats is not None,
        "tries": config.tries,
        "tensors": len(names),
        "tensor_bytes": elements * FLOAT32_BYTES,
        **choice,
    }


def _decide(run: _Run) -> tuple[Found | None, dict[str, Any] | None]:
    """The rotations to apply, None for the model as it is; and why, where that was to be decided."""
    if run.config.rotate == "never":
        return None, None
    search = RotationSearch(run.source, run.config, run.stats, run.workers, run.device)
    found = search.kept(run.output, run.progress)
    if run.config.rotate == "always":
        return found, None
    if not run.output.done(CHOICE):
        made = choose(run.source, run.config, run.stats, found.rotations, workers=run.workers, progress=run.progress)
        run.output.write(CHOICE, {}, made)
    choice: dict[str, Any] = run.output.result(CHOICE)
    return (found if choice["chosen"] in TURNED else None), choice


def _leave(run: _Run, manifest: dict[str, Any]) -> None:
    """Finish with the model and its statistics as they are."""
    shards, output = run.source.shards(), run.output
    for done, (shard, names) in enumerate(shards.items()):
        run.progress(done, len(shards), shard)
        if not output.done(shard):
            output.take(shard, run.source, names)
    if run.stats is not None:
        MovedStats(run.source, run.stats, [], run.workers).write(output.partial, output.stage)
    (output.partial / f"{MATRICES}.safetensors").unlink(missing_ok=True)
    run.progress(len(shards), len(shards), "done")
    output.finish(list(shards), manifest, run.source.side_files())


def _turn(run: _Run, manifest: dict[str, Any], found: Found) -> None:
    """Write the rotated tensors, the moved statistics and the folded gains."""
    source, output, rotations = run.source, run.output, found.rotations
    untied = unties_head(source, run.config)
    shards = _shards(source, untied=untied)
    total = len(shards) + (run.stats is not None)
    rotator = Rotator(source, rotations, run.workers, device=run.device)
    for done, (shard, names) in enumerate(shards.items()):
        run.progress(done, total, shard)
        if not output.done(shard):
            output.write(shard, {name: rotator.tensor(name) for name in names})
    if run.stats is not None:
        run.progress(len(shards), total, "statistics")
        MovedStats(source, run.stats, rotations, run.workers).write(output.partial, output.stage)
    gains = {name: source.read(name) for name in sorted(rotator.folded)}
    if gains and not output.done(GAINS):
        output.write(GAINS, gains)
    run.progress(total, total, "done")
    numbers = manifest["hyperparameters"]
    manifest |= {
        "hyperparameters": {**numbers, "tied": numbers["tied"] and not untied},
        "rotations": [rotation.to_json() for rotation in rotations],
        # What undoing it needs.
        "folded": {
            "norms": {name: sha256_of(gain) for name, gain in gains.items()},
            "untied": untied,
            "fixed_target": "target" not in source.manifest and "target" in manifest,
        },
        **({"rotation_search": found.told} if found.told else {}),
    }
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
    quantize finds them. By default they also decide: where rotating does not pay the model is left as it is, and the
    manifest's "rotation_choice" tells why. Raises RondelError for a rotated or quantized model and for what the family
    does not allow.
    """
    _checked(source, config, stats)
    check_device(device)
    target = resolved_target(source, config)
    record = stage_record("rotate", config, source=source, stats=stats)
    beside = (MOVED, f"{MATRICES}.safetensors", f"{GAINS}.safetensors")
    output = StageOutput(out, record, force=force, beside=beside)
    if output.finished:
        return Checkpoint(out, read_manifest(out))
    manifest = {**source.carried(), "stages": [*source.stages, record]}
    if target:
        manifest["target"] = target
    with Workers(threads) as workers:
        run = _Run(source, config, stats, output, workers, device, progress)
        found, choice = _decide(run)
        if choice is not None:
            manifest["rotation_choice"] = choice
        if found is None:
            _leave(run, manifest)
        else:
            _turn(run, manifest, found)
    return Checkpoint(out, read_manifest(out))
