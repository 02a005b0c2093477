"""Owns what is measured of activations: second moments and largest values a site, norms and outliers of the stream.

Sums over one window are float32; windows are added in float64 in their order and every strip of a sum by one worker, so
threads do not change the result.
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
from rondel.quant.workers import Workers

# An activation is massive when it is this many times the mean magnitude of its window (Sun et al., arXiv 2402.17762,
# count those 1000 times the median; around 100 times the mean the two agree and no sorting is needed).
MASSIVE = 100.0
TILE = 256  # rows of a second moment that one worker adds up at a time
MASSIVE_KEPT = 32  # the largest ones of a layer go to the manifest
LARGEST_SHARE = 0.001  # of a window's values: where in the text these stand is the other rule, which needs no threshold
POSITIONS_KEPT = 8

Massive = tuple[float, int, int]  # value, position, channel


@dataclass(frozen=True)
class Stream:
    """One window of the residual stream: norms (tokens,), massive activations, and where its largest values stand."""

    norms: torch.Tensor
    massive: list[Massive]
    mean: float  # magnitude of all values
    limit: float  # the magnitude of the smallest of the largest 0.1 %
    largest: torch.Tensor  # how many of those each position has (tokens,)


class SiteSums:
    """Float64 sums over tokens at one site of `size` channels: of x x^T, or of x^2 where only diagonals are kept.

    The matrix is added up in strips of TILE rows, each from its diagonal on: the lower half is the mirror image.
    """

    def __init__(self, size: int, *, diagonal: bool, device: str | torch.device) -> None:
        self.size = size
        self.moment = torch.zeros(size if diagonal else (size, size), dtype=torch.float64, device=device)
        self.absmax = torch.zeros(size, device=device)
        self.count = 0

    def add(self, windows: list[torch.Tensor], workers: Workers) -> None:
        """Add some windows' activations; strips are spread over the workers."""
        workers.run(lambda first: self.add_strip(first, windows), range(0, self.size, TILE))
        self.count += sum(len(x) for x in windows)

    def add_strip(self, first: int, windows: list[torch.Tensor]) -> None:
        """Add the rows [first, first + TILE) of every window's sums, activations (tokens, size) each, in order."""
        strip = slice(first, first + TILE)
        for x in windows:
            part = x[:, strip]
            if self.moment.dim() == 1:
                self.moment[strip] += part.square().sum(0)
            else:
                self.moment[strip, first:] += part.T @ x[:, first:]
            self.absmax[strip] = torch.maximum(self.absmax[strip], part.abs().amax(0))

    def mean(self, layer: int | None, site: str) -> torch.Tensor:
        """The mean over the tokens, float64: (size, size) symmetric, or (size,). It takes the place of the sums."""
        mean = self.moment.div_(self.count)
        for first in range(0, self.size if mean.dim() == 2 else 0, TILE):
            strip, behind = slice(first, first + TILE), slice(first + TILE, None)
            mean[behind, strip] = mean[strip, behind].T
            mean[strip, strip] = mean[strip, strip].triu() + mean[strip, strip].triu(1).T
        check_finite(mean, layer, site)
        return mean

    def tensors(self, layer: int | None, site: str) -> dict[str, torch.Tensor]:
        """What the statistics folder holds of this site, F32."""
        mean = self.mean(layer, site).to(torch.float32).cpu()
        check_finite(mean, layer, site)
        diagonal = mean if mean.dim() == 1 else mean.diagonal().clone()
        found = {
            site_tensor(layer, site, "diagonal"): diagonal,
            site_tensor(layer, site, "absmax"): self.absmax.cpu(),
            site_tensor(layer, site, "count"): torch.tensor([float(self.count)]),
        }
        return found if mean.dim() == 1 else {site_tensor(layer, site, "second_moment"): mean, **found}


class CrossSums:
    """Float64 sums over tokens of y x^T, for two activations y and x (tokens, size) of one site."""

    def __init__(self, size: int, device: str | torch.device) -> None:
        self.moment = torch.zeros((size, size), dtype=torch.float64, device=device)
        self.count = 0

    def add(self, windows: list[tuple[torch.Tensor, torch.Tensor]], workers: Workers) -> None:
        """Add some windows' activations y and x, in order; strips of TILE rows are spread over the workers."""

        def add_strip(first: int) -> None:
            for y, x in windows:
                self.moment[first : first + TILE] += y[:, first : first + TILE].T @ x

        workers.run(add_strip, range(0, len(self.moment), TILE))
        self.count += sum(len(x) for _, x in windows)

    def mean(self, layer: int | None, site: str) -> torch.Tensor:
        """The mean over the tokens. It takes the place of the sums."""
        mean = self.moment.div_(self.count)
        check_finite(mean, layer, site)
        return mean


def check_finite(moment: torch.Tensor, layer: int | None, site: str) -> None:
    """Refuse what a model that overflows leaves behind."""
    # In strips: on the way torch makes a copy of what it is asked about.
    if not all(bool(torch.isfinite(strip).all()) for strip in moment.split(TILE)):
        where = site if layer is None else f"{site} of layer {layer}"
        raise RondelError(f"activations at {where} are not finite: the model overflows in float32, or is damaged")


class LayerSums:
    """The sums of all sites that a layer's forward passes showed; `add` takes groups of windows in their order."""

    def __init__(self, *, diagonal: bool) -> None:
        self.diagonal = diagonal
        self.sites: dict[str, SiteSums] = {}

    def add(self, windows: list[dict[str, torch.Tensor]], workers: Workers) -> None:
        """Add the activations of some windows, each site to (tokens, d) float32; strips are spread over the workers."""
        for site, x in windows[0].items():
            if site not in self.sites:
                self.sites[site] = SiteSums(x.shape[1], diagonal=self.diagonal, device=x.device)
        strips = [(site, first) for site in windows[0] for first in range(0, self.sites[site].size, TILE)]
        workers.run(
            lambda strip: self.sites[strip[0]].add_strip(strip[1], [seen[strip[0]] for seen in windows]), strips
        )
        for site in windows[0]:
            self.sites[site].count += sum(len(seen[site]) for seen in windows)

    def tensors(self, layer: int | None) -> dict[str, torch.Tensor]:
        """The statistics folder's tensors of all sites."""
        return {name: value for site, sums in self.sites.items() for name, value in sums.tensors(layer, site).items()}


@dataclass
class StreamSummary:
    """Norms of the residual stream's tokens behind one layer, and its massive activations."""

    norms: list[torch.Tensor] = field(default_factory=list)
    massive: list[tuple[float, int, int, int]] = field(default_factory=list)  # value, window, position, channel
    means: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    largest: list[torch.Tensor] = field(default_factory=list)

    def add(self, window: int, seen: Stream) -> None:
        """Take in one window."""
        self.norms.append(seen.norms)
        self.massive += [(value, window, position, channel) for value, position, channel in seen.massive]
        self.means.append(seen.mean)
        self.limits.append(seen.limit)
        self.largest.append(seen.largest)

    def to_json(self) -> dict[str, Any]:
        """Mean, median and largest norm, the largest massive activations, and which positions the largest 0.1 % share.

        Where outliers belong to tokens, as at the first one, a few positions have them all; those of channels are
        everywhere.
        """
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
            "massive_from": MASSIVE * sum(self.means) / len(self.means),
            "magnitude_99_9": sum(self.limits) / len(self.limits),
            "positions_99_9": self._positions(),
        }

    def _positions(self) -> list[dict[str, Any]]:
        """The positions with most of the largest 0.1 %, and the share that each has."""
        counts = torch.stack(self.largest).sum(0)
        order = sorted(range(len(counts)), key=lambda position: (-int(counts[position]), position))
        shares = [(position, int(counts[position]) / int(counts.sum())) for position in order[:POSITIONS_KEPT]]
        return [{"position": position, "share": share} for position, share in shares if share > 0]


def stream_of(x: torch.Tensor) -> Stream:
    """What is measured of one window's stream (tokens, width)."""
    sizes = x.abs()
    mean = sizes.mean()
    places = (sizes > MASSIVE * mean).nonzero().tolist()
    massive = [(float(x[position, channel]), position, channel) for position, channel in places]
    limit = sizes.flatten().topk(max(1, int(LARGEST_SHARE * sizes.numel()))).values[-1]
    return Stream(x.norm(dim=1).cpu(), massive, float(mean), float(limit), (sizes >= limit).sum(1).cpu())


class SiteReached(Exception):
    """Ends a forward pass at the site that `SiteHooks.start` was told: nothing behind it is needed."""


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
                if self._seen.last == site:
                    raise SiteReached
            return (x,)

        return see

    def __enter__(self) -> SiteHooks:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the layer."""
        for handle in self._handles:
            handle.remove()

    def start(self, last: str | None = None) -> None:
        """Forget what this thread saw. Its next pass ends with SiteReached at the site `last`, where one is given."""
        self._seen.sites, self._seen.last = {}, last

    def take(self) -> dict[str, torch.Tensor]:
        """Site to its activations (tokens, d) in this thread's pass since `start`."""
        seen: dict[str, torch.Tensor] = self._seen.sites
        self._seen.sites = {}
        return seen
