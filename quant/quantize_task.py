"""The settings of the stage quantize, and everything that follows from them before the first weight is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint, check_runs
from rondel.converters.errors import RondelError
from rondel.converters.family import EMBEDDING
from rondel.converters.stats import OUTPUT_IN, Stats
from rondel.native.formats import encode
from rondel.quant import rescaling
from rondel.quant.budget import Budget, budget_of, check_statistics
from rondel.quant.fallbacks import is_tile
from rondel.quant.importance import Importance, Means, check_importance, importance_of
from rondel.quant.methods import Method, method_named
from rondel.quant.mixtures import Choice, Policy, choose_formats, format_named, mixture_named, model_of
from rondel.quant.rescaled_view import RescaledView, Rescaling, rescaled_importance
from rondel.quant.rounding import Encoder
from rondel.quant.rtn import AffineEncoder, check_granularity
from rondel.quant.sequential import FEWEST_WINDOWS
from rondel.quant.spending import Allocated
from rondel.quant.stage import stage_record
from rondel.quant.trial import Rounding

TARGETS = ("llama.cpp", "rondel")
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
class Task:
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
    recipe: str | None = None  # whose text the file will hold

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
        counts = self.recipe is not None and self.budget is not None and self.budget.bpw is None
        recipe = f"{len(str(self.recipe).encode())} bytes" if counts else None  # all of it that decides the formats
        return stage_record("quantize", self.config, source=self.source, stats=self.importance, recipe=recipe)


def _target(source: Checkpoint, config: QuantizeConfig) -> str:
    fixed = source.manifest.get("target")
    target = config.target or fixed or TARGETS[0]
    if target not in TARGETS:
        raise RondelError(f"--target {target}: expected llama.cpp or rondel")
    if target == "llama.cpp" and any(rotation.online for rotation in source.rotations):
        raise RondelError(f"{source.root}: has online rotations, which llama.cpp cannot run; use --target rondel")
    return target


def holds_text(importance: Importance | None) -> bool:
    """Whether the statistics hold text enough for error feedback."""
    windows = importance.stats.windows() if importance and importance.stats else None
    return windows is not None and len(windows) >= FEWEST_WINDOWS


def _decided(source: Checkpoint, type_: str | None) -> dict[str, Any]:
    """What rotate measured to be best for models of this type; empty where it measured nothing for it."""
    choice: dict[str, Any] = source.manifest.get("rotation_choice", {})
    return choice if choice.get("type") == type_ else {}


def _method(config: QuantizeConfig, importance: Importance | None, decided: str | None) -> Method:
    """The method asked for, or decided before, or the best one that the statistics allow."""
    stats = importance.stats if importance else None
    enough = holds_text(importance)
    if config.method is None:
        full = stats is not None and stats.has(None, OUTPUT_IN, "second_moment")
        best = Method("gptq" if enough and full else "imatrix")
        method = method_named(decided) if decided else best
        return method if method.rounding == best.rounding else best
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
    target, type_ = _target(source, config), _type(config, budget)
    decided = _decided(source, type_)
    resolved = replace(
        config,
        type=type_,
        like=budget.like if budget else None,
        method=_method(config, importance, decided.get("method")).name,
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


def before_statistics(config: QuantizeConfig) -> QuantizeConfig:
    """What of the settings can be checked while calibrate is still to run: no budget, no method that needs statistics.

    Raises RondelError for a budget or a method that means nothing with any statistics.
    """
    budget = budget_of(config.bpw, config.size, config.like)
    _type(config, budget)
    method = method_named(config.method) if config.method else None
    if method and (method.feeds_back or method.rescaling):
        config = replace(config, method=None, alpha=None, granularity="group")
    return replace(config, bpw=None, size=None, like=None)


def prepare(source: Checkpoint, config: QuantizeConfig, stats: Stats | Importance | None) -> Task:
    """The task of these settings; raises RondelError for all that contradicts itself or the model."""
    check_runs(source, "quantized")
    if source.quantized:
        raise RondelError(f"{source.root}: is quantized already; quantize the float model that it was made from")
    if source.manifest.get("replication"):
        raise RondelError(f"{source.root}: is replicated, and its copies belong to these weights; quantize before that")
    importance = _as_importance(stats)
    budget = budget_of(config.bpw, config.size, config.like)
    config = _resolve(source, config, budget, importance)
    if budget:
        check_statistics(budget, importance)
    # With a budget the mixture only stands in for what will be chosen.
    mixture = config.type or config.like or DEFAULT_TYPE
    patterns = _patterns(config, source.names())
    fine = _decided(source, config.type).get("embedding_type")
    forced = config.embedding_type or config.pure or any(pattern.search(EMBEDDING) for pattern, _ in patterns)
    if fine and not forced:
        config = replace(config, embedding_type=fine)
    policy = Policy(mixture, config.pure, patterns, config.embedding_type, config.output_type)
    choices = choices_for(source, policy, statistics=importance is not None)
    method = method_named(str(config.method))
    check_granularity(method.rounding, config.granularity, {name: choice.format for name, choice in choices.items()})
    rescaling.check(source, method, importance, config.alpha)
    warnings = warnings_of(source, method, importance, choices)
    return Task(source, config, method, importance, choices, warnings, policy, budget)


def choices_for(source: Checkpoint, policy: Policy, *, statistics: bool) -> dict[str, Choice]:
    """The format of every matrix of a model; `statistics`: whether there are any to weigh the errors."""
    shapes = {name: source.info(name).shape for names in source.shards().values() for name in names}
    return choose_formats(shapes, policy, model_of(source.family, source.numbers, shapes, statistics))


def warnings_of(
    source: Checkpoint, method: Method, importance: Importance | None, choices: dict[str, Choice]
) -> list[str]:
    """A sentence for each thing that the user may not expect of these choices."""
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
