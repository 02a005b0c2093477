"""A budget of bytes becomes a format for every matrix: sensitivities, costs of the candidates, allocation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.export import header_bytes
from rondel.converters.family import EMBEDDING, OUTPUT
from rondel.converters.gguf_keys import ALIGNMENT
from rondel.converters.gguf_writer import padded
from rondel.converters.progress import Progress, silent
from rondel.converters.stats import Stats
from rondel.native.formats import format_bytes
from rondel.quant.allocation import Option, allocate
from rondel.quant.candidates import Cost, candidates, column_weights, feedback_share, measure, uses_of
from rondel.quant.importance import Importance, Means, site_of
from rondel.quant.methods import Method
from rondel.quant.mixtures import (
    MIXTURES,
    Choice,
    Policy,
    choose_formats,
    fitting,
    forced_format,
    is_matrix,
    is_tile,
    mixture_named,
    model_of,
)
from rondel.quant.sensitivity import Sensitivity, measure_sensitivity
from rondel.quant.workers import Workers

FLOAT_BYTES = 4  # norms, biases and RoPE factors stay F32
# Formats below this share of the mean bits are not tried: the IQ1 types encode slowly. Up to four bits they are worth
# it: the best allocation at 3.1 bits gives the weakest matrices half of that, without IQ1 it is 5 % worse (prose-7m).
LEAST_SHARE = 0.35

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Budget:
    """What a model may take: one of bits a weight, bytes of the GGUF file, or a mixture whose file is as large."""

    bpw: float | None = None
    size: int | None = None
    like: str | None = None

    @property
    def option(self) -> str:
        """The option as the user gives it, for messages."""
        if self.like is not None:
            return f"--like {self.like}"
        return f"--size {self.size}" if self.size is not None else f"--bpw {self.bpw:g}"


@dataclass(frozen=True)
class Allocated:
    """A format of each matrix and what it costs, how much the embedding's columns count, and the sizes."""

    formats: Mapping[str, str]
    costs: Mapping[str, Cost]
    embedding: Means | None
    told: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What the journal keeps."""
        costs = {name: asdict(cost) for name, cost in self.costs.items()}
        embedding = None if self.embedding is None else self.embedding.tolist()
        return {"formats": dict(self.formats), "costs": costs, "embedding": embedding, "told": dict(self.told)}

    @staticmethod
    def from_json(kept: Mapping[str, Any]) -> Allocated:
        """The inverse of `to_json`."""
        costs = {name: Cost(**cost) for name, cost in kept["costs"].items()}
        embedding = None if kept["embedding"] is None else np.array(kept["embedding"], np.float32)
        return Allocated(kept["formats"], costs, embedding, kept["told"])


def budget_of(bpw: float | None, size: int | None, like: str | None) -> Budget | None:
    """The budget that was asked for, or None. Raises RondelError for two of them, and for values that mean nothing."""
    given = [f"--{name}" for name, value in (("bpw", bpw), ("size", size), ("like", like)) if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise RondelError(f"{' and '.join(given)}: each says how large the model may be; give one of them")
    if bpw is not None and not (math.isfinite(bpw) and bpw > 0):
        raise RondelError(f"--bpw {bpw}: expected a positive number of bits a weight, such as 2.7")
    if size is not None and size <= 0:
        raise RondelError(f"--size {size}: expected a positive number of bytes, such as 900M")
    if like is not None:
        like = mixture_named(like)
        if is_tile(like):
            raise RondelError(f"--like {like}: expected one of llama.cpp's mixtures: {', '.join(MIXTURES)}")
    return Budget(bpw, size, like)


def check_statistics(budget: Budget, importance: Importance | None) -> None:
    """Refuse what no sensitivities can be measured with."""
    if importance is None or importance.stats is None or importance.stats.windows() is None:
        given = importance.name if importance else "none are given"
        raise RondelError(
            f"{budget.option}: needs statistics with the tokens of their text ({given}); "
            "run rondel calibrate and give its folder with --stats"
        )


@dataclass(frozen=True)
class Account:
    """How many bytes formats take, every tensor up to a multiple of `alignment`, on top of `overhead`."""

    shapes: Shapes
    alignment: int = 1
    overhead: int = 0

    def tensor(self, name: str, format: str | None) -> int:
        """Bytes of one tensor; None: it stays F32."""
        shape = self.shapes[name]
        size = format_bytes(format, *shape) if format else FLOAT_BYTES * math.prod(shape)
        return padded(size, self.alignment)

    def total(self, formats: Mapping[str, str]) -> int:
        """Bytes of everything."""
        return self.overhead + sum(self.tensor(name, formats.get(name)) for name in self.shapes)

    @property
    def weights(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Spending:
    """What to spread a budget over, and how the matrices will be rounded."""

    source: Checkpoint
    stats: Stats
    budget: Budget
    policy: Policy  # its overrides hold; its mixture is not asked
    record: Mapping[str, Any]  # of the stage, for the size of the header
    means: Callable[[str], Means | None]  # how much each matrix's columns count when it is rounded
    method: Method


def _planned(wanted: Spending, formats: Mapping[str, str]) -> Checkpoint:
    """The checkpoint that quantize will write, as far as its metadata tells: enough for the file's header."""
    source, record, calibration = wanted.source, wanted.record, wanted.stats.calibration
    tensors = {
        name: {"shape": source.info(name).shape, "format": formats.get(name, "F32"), "shard": "", "sha256": ""}
        for name in source.names()
    }
    manifest = {**source.manifest, "tensors": tensors, "stages": [*source.stages, record]}
    manifest |= {"target": record["config"]["target"]}
    if calibration:
        manifest["calibration"] = calibration
    return Checkpoint(source.root, manifest)


def _mixture(source: Checkpoint, shapes: Shapes, mixture: str) -> dict[str, str]:
    """The formats of a mixture by llama.cpp's rules."""
    model = model_of(source.family, source.numbers, shapes, importance=True)
    return {name: choice.format for name, choice in choose_formats(shapes, Policy(mixture), model).items()}


def _allowed(budget: Budget, source: Checkpoint, account: Account, standard: Account) -> int:
    """The most bytes. A mixture's are those of a file without rondel's own keys, as llama.cpp makes it."""
    if budget.bpw is not None:
        return int(budget.bpw * account.weights / 8)
    if budget.size is not None:
        return budget.size
    assert budget.like is not None
    return standard.total(_mixture(source, account.shapes, budget.like))


def _refuse(budget: Budget, account: Account, smallest: int) -> None:
    if budget.bpw is not None:
        bits = math.ceil(8e3 * smallest / account.weights) / 1e3
        raise RondelError(f"{budget.option}: the smallest formats that this model fits take {bits:.3f} bits a weight")
    raise RondelError(f"{budget.option}: the smallest file that this model fits has {smallest} bytes")


def _smallest(account: Account, tried: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: min(formats, key=lambda f: account.tensor(name, f)) for name, formats in tried.items()}


def _worth_trying(account: Account, tried: Mapping[str, tuple[str, ...]], allowed: int) -> dict[str, tuple[str, ...]]:
    """Without the formats far below the mean bits a weight, unless the budget asks for them."""
    bits = 8 * allowed / account.weights

    def kept(name: str, formats: tuple[str, ...]) -> tuple[str, ...]:
        least = LEAST_SHARE * bits / 8 * math.prod(account.shapes[name])
        return tuple(format for format in formats if account.tensor(name, format) >= least) or formats

    fewer = {name: kept(name, formats) for name, formats in tried.items()}
    return fewer if account.total(_smallest(account, fewer)) <= allowed else dict(tried)


def spread(
    wanted: Spending,
    folder: Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Allocated:
    """Choose a format for every matrix of the source; `folder` may hold the hidden states of a few windows meanwhile.

    Raises RondelError where the budget is too small, with the smallest that is possible.
    """
    source, budget = wanted.source, wanted.budget
    shapes = {name: source.info(name).shape for name in source.names()}
    tried = _tried(shapes, wanted.policy)
    tensors = Account(shapes)
    header, standard_header = header_bytes(_planned(wanted, _smallest(tensors, tried)))
    file, standard = Account(shapes, ALIGNMENT, header), Account(shapes, ALIGNMENT, standard_header)
    account = tensors if budget.bpw is not None else file
    allowed, smallest = _allowed(budget, source, file, standard), account.total(_smallest(account, tried))
    if smallest > allowed:
        _refuse(budget, account, smallest)
    tried = _worth_trying(account, tried, allowed)
    windows = wanted.stats.windows()
    assert windows is not None, "statistics without text were refused"
    sensitivity = measure_sensitivity(source, windows, folder, threads=threads, device=device, progress=progress)
    costs, embedding = _costs(wanted, tried, sensitivity, threads=threads, device=device, progress=progress)
    chosen = _allocated(account, costs, allowed)
    kept = {name: costs[name][format] for name, format in chosen.items()}
    told = {
        "asked": budget.option.removeprefix("--"),
        "most_bytes": allowed,
        "bytes": account.total(chosen),
        "file_bytes": file.total(chosen),
        "expected_kl": float(f"{sum(cost.nats for cost in kept.values()):.6g}"),
    }
    return Allocated(chosen, kept, embedding, told)


def _tried(shapes: Shapes, policy: Policy) -> dict[str, tuple[str, ...]]:
    """The formats that each matrix may get."""
    tried = {}
    for name, shape in shapes.items():
        if is_matrix(name, shape):
            forced = forced_format(name, policy)
            tried[name] = (fitting(forced, shape[1]),) if forced else candidates(shape[1])
    return tried


def _allocated(account: Account, costs: Mapping[str, Mapping[str, Cost]], allowed: int) -> dict[str, str]:
    """The allocation to the matrices, in what the other tensors leave of the budget."""
    options = [
        [Option(format, account.tensor(name, format), cost.nats) for format, cost in found.items()]
        for name, found in costs.items()
    ]
    fixed = account.overhead + sum(account.tensor(name, None) for name in account.shapes if name not in costs)
    chosen = allocate(options, allowed - fixed)
    return {name: option.format for name, option in zip(costs, chosen, strict=True)}


def _costs(
    wanted: Spending,
    tried: Mapping[str, tuple[str, ...]],
    sensitivity: Sensitivity,
    *,
    threads: int | None,
    device: str,
    progress: Progress,
) -> tuple[dict[str, dict[str, Cost]], Means | None]:
    """What every format tried costs every matrix, and the importance of the embedding's columns."""
    costs: dict[str, dict[str, Cost]] = {}
    embedding = None
    shares = _Shares(wanted, device) if wanted.method.feeds_back else None
    with Workers(threads) as workers:
        for done, (name, formats) in enumerate(tried.items()):
            progress(done, len(tried), "candidates")
            uses = uses_of(wanted.source, wanted.stats, sensitivity, name)
            importance = wanted.means(name)
            if name == EMBEDDING and OUTPUT not in wanted.source and wanted.method.weighted:
                importance = embedding = column_weights(uses)
            found = measure(name, wanted.source.read(name), formats, uses, importance=importance, workers=workers)
            share = shares.of(name) if shares else 1.0
            costs[name] = {format: replace(cost, nats=share * cost.nats) for format, cost in found.items()}
    return costs, embedding


class _Shares:
    """What error feedback leaves of the costs at each site: matrices that read one site follow each other."""

    def __init__(self, wanted: Spending, device: str) -> None:
        self._wanted, self._device = wanted, device
        self._known: dict[tuple[int | None, str | None], float] = {}

    def of(self, name: str) -> float:
        """The share of one matrix, factored once a site."""
        source = self._wanted.source
        place = site_of(source, name)
        if place not in self._known:
            self._known[place] = feedback_share(source, self._wanted.stats, name, self._device)
        return self._known[place]


def choices_of(allocated: Allocated) -> dict[str, Choice]:
    """The formats as choices of the stage."""
    return {name: Choice(format, format) for name, format in allocated.formats.items()}
