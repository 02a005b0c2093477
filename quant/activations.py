"""Owns what is measured of activations: second moments and largest values a site, norms and outliers of the stream.

Sums over one window are float32; windows are added in float64 in their order, so threads do not change the result.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from rondel.converters.errors import RondelError
from rondel.converters.family import Family
from rondel.converters.rotation import Rotation
from rondel.converters.stats import site_tensor
from rondel.quant.hadamard import rotate_channels

# An activation is massive when it is this many times the mean magnitude of its window (Sun et al., arXiv 2402.17762,
# count those 1000 times the median; around 100 times the mean the two agree and no sorting is needed).
MASSIVE = 100.0
MASSIVE_KEPT = 32  # the largest ones of a layer go to the manifest

Massive = tuple[float, int, int]  # value, position, channel


@dataclass
class SiteSums:
    """Sums over tokens at one site; `moment` is (d, d), or (d,) where only squares are kept."""

    moment: torch.Tensor
    absmax: torch.Tensor
    count: int

    @staticmethod
    def of(x: torch.Tensor, diagonal: bool) -> SiteSums:
        """The sums of one window's activations (tokens, d) float32."""
        moment = x.square().sum(0) if diagonal else x.T @ x
        return SiteSums(moment, x.abs().amax(0), len(x))

    def add(self, other: SiteSums) -> None:
        """Take another window's sums in."""
        self.moment = self.moment.to(torch.float64)
        self.moment += other.moment
        self.absmax = torch.maximum(self.absmax, other.absmax)
        self.count += other.count

    def tensors(self, layer: int | None, site: str) -> dict[str, torch.Tensor]:
        """What the statistics folder holds of this site, F32."""
        mean = (self.moment.to(torch.float64) / self.count).to(torch.float32).cpu()
        diagonal = mean if mean.dim() == 1 else mean.diagonal().clone()
        if not bool(torch.isfinite(mean).all()):
            where = site if layer is None else f"{site} of layer {layer}"
            raise RondelError(f"activations at {where} are not finite: the model overflows in float32, or is damaged")
        found = {
            site_tensor(layer, site, "diagonal"): diagonal,
            site_tensor(layer, site, "absmax"): self.absmax.cpu(),
            site_tensor(layer, site, "count"): torch.tensor([float(self.count)]),
        }
        return found if mean.dim() == 1 else {site_tensor(layer, site, "second_moment"): mean, **found}


@dataclass
class StreamSummary:
    """Norms of the residual stream's tokens behind one layer, and its massive activations."""

    norms: list[torch.Tensor] = field(default_factory=list)
    massive: list[tuple[float, int, int, int]] = field(default_factory=list)  # value, window, position, channel

    def add(self, window: int, norms: torch.Tensor, massive: list[Massive]) -> None:
        """Take in one window: norms (tokens,), and its massive activations as value, position, channel."""
        self.norms.append(norms)
        self.massive += [(value, window, position, channel) for value, position, channel in massive]

    def to_json(self) -> dict[str, Any]:
        """Mean, median and largest norm, and the largest massive activations."""
        norms = torch.cat(self.norms).to(torch.float64).sort().values
        largest = sorted(self.massive, key=lambda found: (-abs(found[0]), *found[1:]))[:MASSIVE_KEPT]
        keys = ("value", "window", "position", "channel")
        return {
            "token_norm": {
                "mean": float(norms.mean()),
                "median": float(norms[len(norms) // 2]),
                "max": float(norms[-1]),
            },
            "massive_activations": [dict(zip(keys, found, strict=True)) for found in largest],
            "massive_count": len(self.massive),
        }


def stream_of(x: torch.Tensor) -> tuple[torch.Tensor, list[Massive]]:
    """Norms (tokens,) and massive activations (value, position, channel) of one window's stream (tokens, width)."""
    limit = MASSIVE * x.abs().mean()
    places = (x.abs() > limit).nonzero().tolist()
    return x.norm(dim=1).cpu(), [(float(x[position, channel]), position, channel) for position, channel in places]


class SiteHooks:
    """Hooks on one decoder layer: each thread finds the inputs of its own last forward pass in `take()`.

    One hook a site, on the first linear that reads it. Online rotations turn the input of every reader, as the runtime
    does, and what is measured is the turned input.
    """

    def __init__(self, layer: torch.nn.Module, family: Family, online: list[Rotation]) -> None:
        self._seen = threading.local()
        rotations = {rotation.site: rotation for rotation in online}
        self._handles = []
        for site in family.sites:
            for index, linear in enumerate(family.readers(site)):
                hook = self._hook(site, rotations.get(site), keep=index == 0)
                self._handles.append(layer.get_submodule(linear.source).register_forward_pre_hook(hook))

    def _hook(self, site: str, rotation: Rotation | None, keep: bool) -> Any:
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = inputs[0] if rotation is None else rotate_channels(inputs[0], rotation)
            if keep:
                self._seen.sites[site] = x.flatten(0, -2)
            return (x,)

        return see

    def __enter__(self) -> SiteHooks:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def start(self) -> None:
        """Forget what this thread saw."""
        self._seen.sites = {}

    def take(self) -> dict[str, torch.Tensor]:
        """Site to its activations (tokens, d) in this thread's pass since `start`."""
        seen: dict[str, torch.Tensor] = self._seen.sites
        self._seen.sites = {}
        return seen
