"""Owns the first half of a method such as awq+gptq: it chooses scales once and journals them."""

from __future__ import annotations

from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import block_tensor
from rondel.converters.folder import read_tensor
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.quant import awq, smoothquant
from rondel.quant.importance import Importance, check_importance
from rondel.quant.methods import Method
from rondel.quant.rescaled_view import Place, Rescaling, place_name, rescalable
from rondel.quant.trial import Rounding, shared_means

SHARD = "rescaling"  # of the journal alone: an interrupted run does not search again


def check(source: Checkpoint, method: Method, importance: Importance | None, alpha: float | None) -> None:
    """Refuse what the rescaling of a method cannot work with."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise RondelError(f"--alpha {alpha}: expected a number from 0 to 1")
    if method.rescaling is None:
        if alpha is not None:
            raise RondelError(f"--alpha {alpha}: {method.name} rescales nothing; use it with awq or smoothquant")
        return
    if importance is None:
        raise RondelError(f"--method {method.name}: needs statistics; calibrate first, or give --imatrix with awq")
    matrices = [block_tensor(layer, role) for layer in range(source.numbers.layers) for role in _roles(source)]
    check_importance(importance, source, matrices)
    if method.rescaling == "smoothquant":
        smoothquant.check(source, importance.stats)


def _roles(source: Checkpoint) -> list[str]:
    return [linear.role for linear in source.family.linears]


def choose(
    source: Checkpoint,
    method: Method,
    importance: Importance,
    rounding: Rounding,
    *,
    alpha: float | None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Rescaling:
    """The scales of a method; `check` has been called."""
    if method.rescaling == "smoothquant":
        assert importance.stats is not None
        used = smoothquant.ALPHA if alpha is None else alpha
        return smoothquant.choose(source, importance.stats, alpha=used, progress=progress)
    return awq.choose(source, importance, rounding, alpha=alpha, threads=threads, progress=progress)


def of_groups(
    source: Checkpoint, method: Method, importance: Importance, groups: dict[str, dict[str, Any]]
) -> dict[Place, torch.Tensor]:
    """The scales again, from what the manifest tells of them and the same statistics."""
    if method.rescaling == "smoothquant":
        assert importance.stats is not None
        alpha = next(iter(groups.values()))["alpha"]
        return dict(smoothquant.choose(source, importance.stats, alpha=alpha).scales)
    scales = {}
    for place in _places(source):
        if place_name(place) in groups:
            layer, site = place
            means = importance.of(source, block_tensor(int(layer or 0), source.family.readers(site)[0].role))
            assert means is not None
            shared = shared_means(source, site, torch.from_numpy(means))
            scales[place] = awq.scale_of(shared, groups[place_name(place)]["alpha"])
    return scales


def _places(source: Checkpoint) -> list[Place]:
    return [place for layer in range(source.numbers.layers) for place in rescalable(source, layer)]


def keep(output: StageOutput, rescaling: Rescaling) -> None:
    """Journal the scales."""
    scales = {place_name(place): scale for place, scale in rescaling.scales.items()}
    output.write(SHARD, scales, rescaling.groups)


def kept(output: StageOutput, source: Checkpoint) -> Rescaling | None:
    """The scales that an interrupted run journaled."""
    if not output.done(SHARD):
        return None
    file = output.partial / f"{SHARD}.safetensors"
    groups = output.result(SHARD)
    scales = {place: read_tensor(file, place_name(place)) for place in _places(source) if place_name(place) in groups}
    return Rescaling(scales, groups)
