"""A budget spread over the matrices of a model: sensitivities, costs of the candidates, allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.export import header_bytes
from rondel.converters.family import EMBEDDING, OUTPUT
from rondel.converters.gguf_keys import ALIGNMENT
from rondel.converters.progress import Progress, silent
from rondel.converters.stats import Stats
from rondel.quant.allocation import Option, allocate
from rondel.quant.budget import Account, Budget, Shapes, refuse, worth_trying
from rondel.quant.candidates import Cost, candidates, column_weights, feedback_share, measure, uses_of
from rondel.quant.fallbacks import fitting
from rondel.quant.importance import Means, site_of
from rondel.quant.methods import Method
from rondel.quant.mixtures import Choice, Policy, choose_formats, forced_format, is_matrix, model_of
from rondel.quant.sensitivity import Sensitivity, measure_sensitivity
from rondel.quant.workers import Workers


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
    recipe: str | None = None  # that the file will hold


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
    header, standard_header = header_bytes(_planned(wanted, tensors.smallest(tried)), wanted.recipe)
    file, standard = Account(shapes, ALIGNMENT, header), Account(shapes, ALIGNMENT, standard_header)
    account = tensors if budget.bpw is not None else file
    allowed, smallest = _allowed(budget, source, file, standard), account.total(account.smallest(tried))
    if smallest > allowed:
        refuse(budget, account, smallest)
    tried = worth_trying(account, tried, allowed)
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


def _allocated(account: Account, costs: Mapping[str, Mapping[str, Cost]], allowed: int) -> dict[str, str]:
    """The allocation to the matrices, in what the other tensors leave of the budget."""
    options = [
        [Option(format, account.tensor(name, format), cost.nats) for format, cost in found.items()]
        for name, found in costs.items()
    ]
    fixed = account.overhead + sum(account.tensor(name, None) for name in account.shapes if name not in costs)
    chosen = allocate(options, allowed - fixed)
    return {name: option.format for name, option in zip(costs, chosen, strict=True)}


def choices_of(allocated: Allocated) -> dict[str, Choice]:
    """The formats as choices of the stage."""
    return {name: Choice(format, format) for name, format in allocated.formats.items()}
