"""The stage quantize: every matrix is rounded onto a block format whose scales fit its statistics.

The error that the scale search makes least is sum_c E[x_c^2] (w_c - q_c)^2 for each row: what the layer's output loses
if its inputs were uncorrelated. Without statistics every column counts the same. A last gain on the scales keeps the
layer's output at full strength, which least squares alone would shrink (native/src/encode/search.h). Where the
statistics hold their text, error feedback does better (gptq.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.folder import Packed
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.converters.stats import Stats
from rondel.native.formats import format_bytes
from rondel.quant import automatic, rescaling
from rondel.quant.contest import PLAIN
from rondel.quant.gptq import HIDDEN_STATES, FeedbackRounding, Request, Starting
from rondel.quant.importance import Importance
from rondel.quant.methods import AUTO, method_named
from rondel.quant.mixtures import Choice
from rondel.quant.quantize_task import QuantizeConfig, Task, holds_text, prepare, warnings_of
from rondel.quant.rounding import Rounded, round_matrix, stored
from rondel.quant.rtn import check_granularity
from rondel.quant.spending import Allocated, Spending, choices_of, spread
from rondel.quant.workers import Workers, check_device

ALLOCATION = "allocation"  # in the journal alone: an interrupted run does not choose again


def _bytes(choice: Choice | None, shape: tuple[int, ...]) -> int:
    if choice is None:
        return 4 * int(np.prod(shape, dtype=np.int64))
    return format_bytes(choice.format, shape[0], shape[1])


def _describe(task: Task, name: str) -> dict[str, Any]:
    """One line of the plan."""
    choice, shape = task.choices.get(name), task.source.info(name).shape
    line: dict[str, Any] = {
        "name": name,
        "shape": list(shape),
        "format": choice.format if choice else "F32",
        "bytes": _bytes(choice, shape),
    }
    if choice and choice.fallback:
        line["instead_of"] = choice.wanted
    if choice and task.allocated:
        cost = task.allocated.costs[name]
        # six digits: the sum's last ones depend on the machine
        line |= {"error": float(f"{cost.error:.6g}"), "cost": float(f"{cost.nats:.6g}")}
    return line


def plan(
    source: Checkpoint,
    config: QuantizeConfig,
    stats: Stats | Importance | None = None,
    *,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """What `quantize` would write: format and exact bytes of every tensor, totals by format, and warnings.

    With a budget the model runs to find out what the formats cost; the plan then has the file's exact size.
    """
    task = prepare(source, config, stats)
    if task.budget:
        with TemporaryDirectory() as folder:
            allocated = spread(_allocation(task), Path(folder), threads=threads, device=device, progress=progress)
        task = _with_formats(task, allocated)
    tensors = [_describe(task, name) for names in source.shards().values() for name in names]
    by_type: dict[str, int] = {}
    for line in tensors:
        by_type[line["format"]] = by_type.get(line["format"], 0) + line["bytes"]
    weights = sum(int(np.prod(line["shape"], dtype=np.int64)) for line in tensors)
    total = sum(by_type.values())
    return {
        "stage": "quantize",
        "config": asdict(task.config),
        **({"budget": dict(task.allocated.told)} if task.allocated else {}),
        "tensors": tensors,
        "bytes": total,
        "bytes_by_type": by_type,
        "bits_per_weight": 8 * total / weights,
        "fallbacks": sum("instead_of" in line for line in tensors),
        "warnings": task.warnings,
    }


def _decide(task: Task, output: StageOutput, threads: int | None, progress: Progress) -> Task:
    """The task with the method that auto takes, found now or by the run that was interrupted."""
    if task.method.name != AUTO:
        return task
    if not output.done(AUTO):
        feedback = holds_text(task.importance)
        methods = automatic.candidates(task.source, task.importance, feedback=feedback) if task.importance else []
        roundings = {method: replace(task, method=method).rounding() for method in methods}
        found = automatic.choose(task.source, task.importance, roundings, threads=threads, progress=progress)
        output.write(AUTO, {}, found)
    choice: dict[str, Any] = output.result(AUTO)
    return replace(task, method=method_named(choice["chosen"]), choice=choice)


def _allocation(task: Task) -> Spending:
    assert task.budget is not None
    assert task.importance is not None
    assert task.importance.stats is not None
    stats, record = task.importance.stats, {"name": "quantize", "config": asdict(task.config)}
    return Spending(task.source, stats, task.budget, task.policy, record, task.means, task.method, task.recipe)


def _with_formats(task: Task, allocated: Allocated) -> Task:
    choices = choices_of(allocated)
    warnings = warnings_of(task.source, task.method, task.importance, choices)
    formats = {name: choice.format for name, choice in choices.items()}
    check_granularity(task.method.rounding, task.config.granularity, formats)
    return replace(task, choices=choices, warnings=warnings, allocated=allocated)


def _allocate(task: Task, output: StageOutput, threads: int | None, device: str, progress: Progress) -> Task:
    """The task with formats within its budget, chosen now or by the run that was interrupted."""
    if task.budget is None:
        return task
    if not output.done(ALLOCATION):
        folder = output.partial / ALLOCATION
        found = spread(_allocation(task), folder, threads=threads, device=device, progress=progress)
        output.write(ALLOCATION, {}, found.to_json())
    return _with_formats(task, Allocated.from_json(output.result(ALLOCATION)))


def _rescale(task: Task, output: StageOutput, threads: int | None, progress: Progress) -> Task:
    """The task with the scales of its method, chosen now or by the run that was interrupted."""
    if task.method.rescaling is None or task.importance is None:
        return task
    found = rescaling.kept(output, task.source)
    if found is None:
        found = rescaling.choose(
            task.source,
            task.method,
            task.importance,
            task.rounding(),
            alpha=task.config.alpha,
            threads=threads,
            progress=progress,
        )
        rescaling.keep(output, found)
    return replace(task, rescaling=found)


RoundShard = Callable[[str, Sequence[str]], dict[str, Rounded]]  # a shard and its matrices


def _plain_rounding(task: Task, threads: int, starting: Starting) -> RoundShard:
    """Every matrix by itself."""

    def rounded(shard: str, names: Sequence[str]) -> dict[str, Rounded]:
        found = {}
        for name in names:
            starting([name])
            weights = task.model.read(name)
            format, means, encoder = task.choices[name].format, task.means(name), task.encoder(weights)
            found[name] = round_matrix(name, weights, format, means, threads, encoder=encoder)
        return found

    return rounded


def _feedback_request(task: Task, device: str) -> Request:
    formats = {name: choice.format for name, choice in task.choices.items()}
    windows = task.importance.stats.windows() if task.importance and task.importance.stats else None
    assert windows is not None, "the method was refused"
    config = task.config
    return Request(task.model, formats, task.means, windows, config.sequential, config.asymmetric, device)


def _write_shards(task: Task, output: StageOutput, shards: Mapping[str, list[str]], round_shard: RoundShard) -> None:
    for shard, names in shards.items():
        if output.done(shard):
            continue
        rounded = round_shard(shard, [name for name in names if name in task.choices])
        tensors: dict[str, torch.Tensor | Packed] = {}
        for name in names:
            if name in rounded:
                tensors[name] = stored(task.choices[name].format, rounded[name].packed, task.source.info(name).shape)
            else:
                tensors[name] = task.model.read_float(name)
        output.write(shard, tensors, {name: _describe(task, name) | made.to_json() for name, made in rounded.items()})


def _kept_plain(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """A warning about the matrices whose codes with error feedback were not better."""
    judged = [result["method"] for result in results.values() if "held_out_error" in result]
    plain = judged.count(PLAIN)
    if not plain:
        return []
    return [f"{plain} of {len(judged)} matrices keep plain codes: feedback did not lower their error on held-out text"]


def quantize(
    source: Checkpoint,
    out: Path,
    config: QuantizeConfig,
    stats: Stats | Importance | None = None,
    *,
    recipe: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Round every matrix of `source` and write the folder `out`; norms, biases and RoPE factors stay F32.

    The manifest's "quantization" keeps, per matrix, its format, bytes and weighted relative squared error; with error
    feedback also the method whose codes were kept and both methods' errors on held-out text. `device` is where the
    model runs and second moments are added up and factored; codes are found in C on the processor. `recipe` is a text
    that the GGUF file will hold, for the bytes of a budget.
    """
    task = replace(prepare(source, config, stats), recipe=recipe)
    check_device(device)
    output = StageOutput(out, task.record(), force=force, beside=HIDDEN_STATES)
    if output.finished:
        return open_checkpoint(out)
    task = _allocate(task, output, threads, device, progress)
    task = _rescale(_decide(task, output, threads, progress), output, threads, progress)
    shards = source.shards()
    done = [name for shard, names in shards.items() if output.done(shard) for name in names if name in task.choices]
    begun = len(done)

    def starting(names: Sequence[str]) -> None:
        nonlocal begun
        progress(begun, len(task.choices), names[0].removesuffix(".weight"))
        begun += len(names)

    with Workers(threads) as workers:
        if task.method.feeds_back:
            feedback = FeedbackRounding(_feedback_request(task, device), output, workers, starting)
            _write_shards(task, output, shards, feedback.round)
            feedback.remove()
        else:
            _write_shards(task, output, shards, _plain_rounding(task, workers.threads, starting))
    progress(len(task.choices), len(task.choices), "done")
    results = {name: result for shard in shards for name, result in output.result(shard).items()}
    manifest = source.carried() | {
        "target": task.config.target,
        "stages": [*source.stages, task.record()],
        "quantization": {"tensors": results, "warnings": [*task.warnings, *_kept_plain(results)]},
    }
    if task.choice is not None:
        manifest["quantization"]["auto"] = task.choice
    if task.allocated is not None:
        manifest["quantization"]["budget"] = dict(task.allocated.told)
    if task.rescaling is not None:
        manifest["quantization"]["rescaling"] = task.rescaling.groups
    if task.importance is not None and task.importance.calibration:
        manifest["calibration"] = dict(task.importance.calibration)
    output.finish(list(shards), manifest, source.side_files())
    return open_checkpoint(out)
