"""Owns a model whose channels are rescaled when it is read: exact in float64, nothing on disk, statistics alike.

Scales s (d,) belong to a site, a place where activations stand. What its linears read becomes x / s, and their columns
are multiplied by s; the division moves into what makes the site, where it costs nothing:

    attn_in, ffn_in, output_in   the gain of the norm
    hidden                       the rows of ffn_up: silu(gate) * up is linear in up
    heads                        the rows and the bias of attn_v: attention mixes positions, never channels. Query heads
                                 that share a key-value head share its channels, and so their scales
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import OUTPUT, OUTPUT_NORM, block_tensor
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.stats import OUTPUT_IN, Stats, site_tensor
from rondel.quant.importance import Importance, site_of

Place = tuple[int | None, str]  # layer (None: outside the blocks) and site
Scales = Mapping[Place, torch.Tensor]  # one a channel of the site, all above zero

WRITERS = {"hidden": "ffn_up", "heads": "attn_v"}  # what a site is linear in, where no norm makes it
POWERS = {"second_moment": 2, "diagonal": 2, "absmax": 1}  # of the scale that each statistic is divided by


def place_name(place: Place) -> str:
    """The place as the manifest names it: "blk.3.attn_in", "output_in"."""
    layer, site = place
    return site if layer is None else f"blk.{layer}.{site}"


def obstacle(source: Checkpoint, place: Place) -> str | None:
    """Why the channels of a place cannot be rescaled, as the end of a sentence; None where they can."""
    layer, site = place
    for rotation in source.rotations:
        here = rotation.layers is None or layer in rotation.layers
        if rotation.online and rotation.site == site and here:
            return "an online rotation stands between the channels and what makes them"
    if layer is None:
        if site == OUTPUT_IN:
            return None if OUTPUT in source else "the head is the embedding, which has no norm in front of it"
        return "there is no such site outside the blocks"
    norm = source.family.norm_making(site)
    if norm is not None and norm.reads == "residual":
        return None
    if site in WRITERS and any(linear.role == WRITERS[site] for linear in source.family.linears):
        return None
    return "neither a norm nor a linear makes them alone"


def rescalable(source: Checkpoint, layer: int) -> list[Place]:
    """The places of a block whose channels can be rescaled, in the order of the forward pass."""
    places: list[Place] = [(layer, site) for site in source.family.sites]
    return [place for place in places if obstacle(source, place) is None]


def over_query_heads(values: torch.Tensor, numbers: Hyperparameters) -> torch.Tensor:
    """One number a value channel (kv_heads * head_dim,) repeated for the query heads that read it."""
    group = numbers.heads // numbers.kv_heads
    return values.reshape(numbers.kv_heads, 1, -1).expand(-1, group, -1).flatten()


def by_query_head(channels: torch.Tensor, numbers: Hyperparameters) -> torch.Tensor:
    """The channels of `heads` as (group, kv_heads * head_dim): row by row the query heads of each value head."""
    group = numbers.heads // numbers.kv_heads
    return channels.reshape(numbers.kv_heads, group, -1).transpose(0, 1).flatten(1)


def _check(source: Checkpoint, place: Place, scale: torch.Tensor) -> None:
    where = f"{source.root}: {place_name(place)}"
    reason = obstacle(source, place)
    if reason:
        raise RondelError(f"{where}: the channels cannot be rescaled: {reason}")
    layer, site = place
    size = source.numbers.width if layer is None else source.numbers.size(source.family.readers(site)[0].cols)
    if tuple(scale.shape) != (size,):
        raise RondelError(f"{where}: scales of shape {list(scale.shape)}, expected [{size}]")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise RondelError(f"{where}: a scale is not a positive number, so it cannot be divided by")
    if site == "heads":
        heads = by_query_head(scale, source.numbers)
        if not bool((heads == heads[0]).all()):
            raise RondelError(f"{where}: query heads of one key-value head have different scales, but share its values")


@dataclass(frozen=True)
class Rescaling:
    """The scales that a method chose, and for each place by its name what the manifest tells of the choice."""

    scales: Scales
    groups: dict[str, dict[str, Any]]


def normalized(scale: torch.Tensor) -> torch.Tensor:
    """Positive scales (d,) with the geometric mean 1: the matrices keep their size, and their scales fit a half."""
    scale = scale.to(torch.float64)
    return (scale / scale.log().mean().exp()).to(torch.float32)


class RescaledView(Checkpoint):
    """`source` with the channels of some places rescaled; the same function to 1e-10 of the largest logit.

    Rescaled tensors come as `dtype`, the others as they are stored.
    """

    def __init__(self, source: Checkpoint, scales: Scales, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(source.root, source.manifest)
        self._view_of, self._dtype = source, dtype
        self._columns: dict[str, torch.Tensor] = {}  # matrix: what its columns are multiplied by
        self._rows: dict[str, torch.Tensor] = {}  # matrix, bias or gain: what its rows are divided by
        for place, scale in scales.items():
            _check(source, place, scale)
            self._put(place, scale.to(torch.float64))

    def _put(self, place: Place, scale: torch.Tensor) -> None:
        layer, site = place
        family = self._view_of.family
        if layer is None:
            self._columns[OUTPUT] = self._rows[OUTPUT_NORM] = scale
            return
        for linear in family.readers(site):
            self._columns[block_tensor(layer, linear.role)] = scale
        norm = family.norm_making(site)
        if norm is not None:
            self._rows[block_tensor(layer, norm.role)] = scale
            return
        made = by_query_head(scale, self._view_of.numbers)[0] if site == "heads" else scale
        for kind in ("weight", "bias"):
            self._rows[block_tensor(layer, WRITERS[site], kind)] = made

    def read(self, name: str) -> torch.Tensor:
        """A tensor after the rescaling."""
        tensor = self._view_of.read(name)
        columns, rows = self._columns.get(name), self._rows.get(name)
        if columns is None and rows is None:
            return tensor
        changed = tensor.to(torch.float64)
        if columns is not None:
            changed = changed * columns
        if rows is not None:
            changed = changed / (rows[:, None] if changed.dim() == 2 else rows)
        return changed.to(self._dtype)


class RescaledStats(Stats):
    """What `stats` would be, had the rescaled model been calibrated: S^-1 H S^-1, d / s^2, max / s."""

    def __init__(self, stats: Stats, scales: Scales) -> None:
        super().__init__(stats.root, stats.manifest)
        self._view_of = stats
        self._divided = {
            site_tensor(*place, what): (power, scale.to(torch.float64))
            for place, scale in scales.items()
            for what, power in POWERS.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """A statistic after the rescaling, F32."""
        found = self._view_of.read(name)
        power, scale = self._divided.get(name, (0, None))
        if scale is None:
            return found
        divisor = torch.outer(scale, scale) if found.dim() == 2 else scale**power
        return (found.to(torch.float64) / divisor).to(torch.float32)


def rescaled_importance(importance: Importance, source: Checkpoint, scales: Scales) -> Importance:
    """The mean squares of the rescaled model's inputs, whether they are from statistics or from an imatrix file."""
    if importance.stats is not None:
        return replace(importance, stats=RescaledStats(importance.stats, scales))
    matrices = dict(importance.matrices)
    for name in matrices.keys() & set(source.names()):
        layer, site = site_of(source, name)
        if site is not None and (layer, site) in scales:
            means = torch.from_numpy(matrices[name]).to(torch.float64) / scales[layer, site].to(torch.float64).square()
            matrices[name] = means.to(torch.float32).numpy()
    return replace(importance, matrices=matrices)
