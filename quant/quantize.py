"""The stage quantize: every matrix is rounded onto a block format whose scales fit its statistics.

The error that the scale search makes least is sum_c E[x_c^2] (w_c - q_c)^2 for each row: what the layer's output loses
if its inputs were uncorrelated. Without statistics every column counts the same. A last gain on the scales keeps the
layer's output at full strength, which least squares alone would shrink (native/src/encode/search.h). Where the
statistics hold their text, error feedback does better (gptq.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import EMBEDDING
from rondel.converters.folder import Packed
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.converters.stats import OUTPUT_IN, Stats
from rondel.native.formats import encode, format_bytes
from rondel.quant import automatic, rescaling
from rondel.quant.budget import Allocated, Budget, Spending, budget_of, check_statistics, choices_of, spread
from rondel.quant.gptq import HIDDEN_STATES, PLAIN, FeedbackRounding, Request, Starting
from rondel.quant.importance import Importance, Means, check_importance, importance_of
from rondel.quant.methods import AUTO, Method, method_named
from rondel.quant.mixtures import (
    Choice,
    Policy,
    choose_formats,
    format_named,
    is_tile,
    mixture_named,
    model_of,
)
from rondel.quant.rescaled_view import RescaledView, Rescaling, rescaled_importance
from rondel.quant.rounding import Encoder, Rounded, round_matrix, stored
from rondel.quant.rtn import AffineEncoder, check_granularity
from rondel.quant.sequential import FEWEST_WINDOWS
from rondel.quant.stage import stage_record
from rondel.quant.trial import Rounding
from rondel.quant.workers import Workers, check_device

TARGETS = ("llama.cpp", "rondel")
ALLOCATION = "allocation"  # in the journal alone: an interrupted run does not choose again
DEFAULT_TYPE = "Q4_K_M"


@dataclass(frozen=True)
class QuantizeConfig:
    """What to quantize to.

    `type` is one of llama.cpp's mixtures (Q4_K_M; Q4_K means it too) or a tile format (U4-128; U4 means it), which
    leaves embedding and head in Q6_K (Q8_0 beside U8). `tensors` holds (regular expression, format): the first
    that is found in a tensor's name decides it. `embedding_type` and `output_type` come before them; `pure` turns the
    mixture's rules off. One of `bpw`, `size` and `like` instead of `type` is a budget, for which the formats are chosen
    by what they cost (budget.py); overrides hold. `method` is a name of methods.py; gptq takes the float model's
    activations where not `sequential`, else those behind the matrices that are rounded already, and where `asymmetric`
    makes up for what those lost. `granularity` says which weights share a scale with rtn ("group", "channel" or
    "tensor").
    """

    type: str | None = None  # None: Q4_K_M, unless there is a budget
    bpw: float | None = None  # bits a weight of all tensors together
    size: int | None = None  # bytes of the GGUF file
    like: str | None = None  # a mixture of llama.cpp: the bytes of its file
    method: str | None = None  # None: gptq where the statistics hold second moments and text, else imatrix
    granularity: str = "group"  # of rtn: the others choose the scales of every group
    alpha: float | None = None  # of awq and smoothquant: None searches it for awq, and is 0.5 for smoothquant
    sequential: bool = True
    asymmetric: bool = True
    pure: bool = False
    tensors: tuple[tuple[str, str], ...] = ()
    embedding_type: str | None = None
    output_type: str | None = None
    target: str | None = None  # "llama.cpp" or "rondel"; None: what an earlier stage chose, else llama.cpp
    seed: int = 0  # kept for the record: rounding to nearest draws no random numbers


@dataclass(frozen=True)
class _Task:
    """Everything decided before the first weight is read."""

    source: Checkpoint
    config: QuantizeConfig  # with canonical names and the target filled in
    method: Method
    importance: Importance | None
    choices: dict[str, Choice]
    warnings: list[str]
    policy: Policy
    budget: Budget | None
    allocated: Allocated | None = None  # where there is a budget: chosen before the rescaling
    rescaling: Rescaling | None = None  # chosen before the first matrix is rounded
    choice: dict[str, Any] | None = None  # why auto took its method

    @cached_property
    def model(self) -> Checkpoint:
        """What is rounded: the source after the rescaling."""
        return RescaledView(self.source, self.rescaling.scales, torch.float32) if self.rescaling else self.source

    @cached_property
    def seen(self) -> Importance | None:
        """The statistics of `model`."""
        if self.importance is None or self.rescaling is None:
            return self.importance
        return rescaled_importance(self.importance, self.source, self.rescaling.scales)

    def means(self, name: str) -> Means | None:
        """How much each column of a matrix counts, or None where all count the same."""
        if name == EMBEDDING and self.allocated and self.allocated.embedding is not None:
            return self.allocated.embedding
        return self.seen.of(self.source, name) if self.seen and self.method.weighted else None

    def encoder(self, weights: torch.Tensor) -> Encoder:
        """What rounds the pieces of one matrix."""
        return AffineEncoder(weights, self.config.granularity) if self.method.rounding == "rtn" else encode

    def rounding(self) -> Rounding:
        """How the method rounds, for those who try scales or methods before."""
        formats = {name: choice.format for name, choice in self.choices.items()}
        return Rounding(formats, self.encoder, self.method.weighted, self.method.feeds_back)

    def record(self) -> dict[str, Any]:
        """The stage's record for the manifest."""
        return stage_record("quantize", self.config, source=self.source, stats=self.importance)


def _target(source: Checkpoint, config: QuantizeConfig) -> str:
    fixed = source.manifest.get("target")
    target = config.target or fixed or TARGETS[0]
    if target not in TARGETS:
        raise RondelError(f"--target {target}: expected llama.cpp or rondel")
    if target == "llama.cpp" and any(rotation.online for rotation in source.rotations):
        raise RondelError(f"{source.root}: has online rotations, which llama.cpp cannot run; use --target rondel")
    return target


def _holds_text(importance: Importance | None) -> bool:
    """Whether the statistics hold text enough for error feedback."""
    windows = importance.stats.windows() if importance and importance.stats else None
    return windows is not None and len(windows) >= FEWEST_WINDOWS


def _method(config: QuantizeConfig, importance: Importance | None) -> Method:
    """The method asked for, or the best one that the statistics allow."""
    stats = importance.stats if importance else None
    enough = _holds_text(importance)
    if config.method is None:
        full = stats is not None and stats.has(None, OUTPUT_IN, "second_moment")
        return Method("gptq" if enough and full else "imatrix")
    method = method_named(config.method)
    if method.feeds_back and not enough:
        given = importance.name if importance else "no statistics"
        raise RondelError(
            f"--method {config.method}: {given}, but error feedback needs the statistics of rondel calibrate with "
            f"{FEWEST_WINDOWS} windows of text or more; calibrate again and give them with --stats"
        )
    return method


def _type(config: QuantizeConfig, budget: Budget | None) -> str | None:
    if budget is None:
        return mixture_named(DEFAULT_TYPE if config.type is None else config.type)
    if config.type is not None or config.pure:
        other = "--pure" if config.pure else f"--type {config.type}"
        raise RondelError(f"{budget.option}: chooses the types itself; leave out {other}, or force some with --tensor")
    return None


def _resolve(
    source: Checkpoint, config: QuantizeConfig, budget: Budget | None, importance: Importance | None
) -> QuantizeConfig:
    """The config with every name checked and spelled as the formats are."""
    target = _target(source, config)
    resolved = replace(
        config,
        type=_type(config, budget),
        like=budget.like if budget else None,
        method=_method(config, importance).name,
        tensors=tuple((pattern, format_named(format)) for pattern, format in config.tensors),
        embedding_type=format_named(config.embedding_type) if config.embedding_type else None,
        output_type=format_named(config.output_type) if config.output_type else None,
        target=target,
    )
    asked = [resolved.type, resolved.embedding_type, resolved.output_type, *(format for _, format in resolved.tensors)]
    tiles = [format for format in asked if format and is_tile(format)]
    if tiles and target != "rondel":
        raise RondelError(f"{tiles[0]}: llama.cpp cannot read this format; use --target rondel or a type of llama.cpp")
    return resolved


def _patterns(config: QuantizeConfig, names: list[str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    compiled = []
    for pattern, format in config.tensors:
        try:
            expression = re.compile(pattern.lower())
        except re.error as error:
            raise RondelError(f"--tensor '{pattern}={format}': not a regular expression ({error})") from error
        if not any(expression.search(name) for name in names):
            raise RondelError(f"--tensor '{pattern}={format}': is found in no tensor's name")
        compiled.append((expression, format))
    return tuple(compiled)


def _as_importance(stats: Stats | Importance | None) -> Importance | None:
    return importance_of(stats) if isinstance(stats, Stats) else stats


def _prepare(source: Checkpoint, config: QuantizeConfig, stats: Stats | Importance | None) -> _Task:
    if source.quantized:
        raise RondelError(f"{source.root}: is quantized already; quantize the float model that it was made from")
    if source.manifest.get("replication"):
        raise RondelError(f"{source.root}: is replicated, and its copies belong to these weights; quantize before that")
    importance = _as_importance(stats)
    budget = budget_of(config.bpw, config.size, config.like)
    config = _resolve(source, config, budget, importance)
    if budget:
        check_statistics(budget, importance)
    shapes = {name: source.info(name).shape for names in source.shards().values() for name in names}
    # With a budget the mixture only stands in for what will be chosen.
    mixture = config.type or config.like or DEFAULT_TYPE
    policy = Policy(mixture, config.pure, _patterns(config, list(shapes)), config.embedding_type, config.output_type)
    model = model_of(source.family, source.numbers, shapes, importance is not None)
    choices = choose_formats(shapes, policy, model)
    method = method_named(str(config.method))
    check_granularity(method.rounding, config.granularity, {name: choice.format for name, choice in choices.items()})
    rescaling.check(source, method, importance, config.alpha)
    warnings = _warnings(source, method, importance, choices)
    return _Task(source, config, method, importance, choices, warnings, policy, budget)


def _warnings(
    source: Checkpoint, method: Method, importance: Importance | None, choices: dict[str, Choice]
) -> list[str]:
    warnings = []
    if not method.weighted:
        pass
    elif importance is None:
        warnings.append("no statistics: every input channel counts the same; calibrate first for a better model")
    else:
        check_importance(importance, source, list(choices))
        missing = [name for name in choices if name != EMBEDDING and importance.of(source, name) is None]
        if missing:
            warnings.append(
                f"no statistics for {len(missing)} matrices, {missing[0]} first: their channels count the same"
            )
    fallbacks = [name for name, choice in choices.items() if choice.fallback]
    if fallbacks:
        warnings.append(f"{len(fallbacks)} matrices have rows that do not fit their format and get another one")
    return warnings


def _bytes(choice: Choice | None, shape: tuple[int, ...]) -> int:
    if choice is None:
        return 4 * int(np.prod(shape, dtype=np.int64))
    return format_bytes(choice.format, shape[0], shape[1])


def _describe(task: _Task, name: str) -> dict[str, Any]:
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
    task = _prepare(source, config, stats)
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


def _decide(task: _Task, output: StageOutput, threads: int | None, progress: Progress) -> _Task:
    """The task with the method that auto takes, found now or by the run that was interrupted."""
    if task.method.name != AUTO:
        return task
    if not output.done(AUTO):
        feedback = _holds_text(task.importance)
        methods = automatic.candidates(task.source, task.importance, feedback=feedback) if task.importance else []
        roundings = {method: replace(task, method=method).rounding() for method in methods}
        found = automatic.choose(task.source, task.importance, roundings, threads=threads, progress=progress)
        output.write(AUTO, {}, found)
    choice: dict[str, Any] = output.result(AUTO)
    return replace(task, method=method_named(choice["chosen"]), choice=choice)


def _allocation(task: _Task) -> Spending:
    assert task.budget is not None
    assert task.importance is not None
    assert task.importance.stats is not None
    stats, record = task.importance.stats, {"name": "quantize", "config": asdict(task.config)}
    return Spending(task.source, stats, task.budget, task.policy, record, task.means, task.method)


def _with_formats(task: _Task, allocated: Allocated) -> _Task:
    choices = choices_of(allocated)
    warnings = _warnings(task.source, task.method, task.importance, choices)
    formats = {name: choice.format for name, choice in choices.items()}
    check_granularity(task.method.rounding, task.config.granularity, formats)
    return replace(task, choices=choices, warnings=warnings, allocated=allocated)


def _allocate(task: _Task, output: StageOutput, threads: int | None, device: str, progress: Progress) -> _Task:
    """The task with formats within its budget, chosen now or by the run that was interrupted."""
    if task.budget is None:
        return task
    if not output.done(ALLOCATION):
        folder = output.partial / ALLOCATION
        found = spread(_allocation(task), folder, threads=threads, device=device, progress=progress)
        output.write(ALLOCATION, {}, found.to_json())
    return _with_formats(task, Allocated.from_json(output.result(ALLOCATION)))


def _rescale(task: _Task, output: StageOutput, threads: int | None, progress: Progress) -> _Task:
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


def _plain_rounding(task: _Task, threads: int, starting: Starting) -> RoundShard:
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


def _feedback_request(task: _Task, device: str) -> Request:
    formats = {name: choice.format for name, choice in task.choices.items()}
    windows = task.importance.stats.windows() if task.importance and task.importance.stats else None
    assert windows is not None, "the method was refused"
    config = task.config
    return Request(task.model, formats, task.means, windows, config.sequential, config.asymmetric, device)


def _write_shards(task: _Task, output: StageOutput, shards: Mapping[str, list[str]], round_shard: RoundShard) -> None:
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
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Round every matrix of `source` and write the folder `out`; norms, biases and RoPE factors stay F32.

    The manifest's "quantization" keeps, per matrix, its format, bytes and weighted relative squared error; with error
    feedback also the method whose codes were kept and both methods' errors on held-out text. `device` is where the
    model runs and second moments are added up and factored; codes are found in C on the processor.
    """
    task = _prepare(source, config, stats)
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
