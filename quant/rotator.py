"""Owns how one tensor turns: which rotation acts on its rows, which on its columns, and the gain folded in between."""

from __future__ import annotations

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import EMBEDDING, OUTPUT, Linear
from rondel.converters.rotation import Rotation
from rondel.quant.fold import folded_gain, folded_norms, place_of_reader, turned_sites
from rondel.quant.hadamard import rotate_channels
from rondel.quant.workers import Workers

CHUNK = 256  # rows or columns that one worker turns at a time; a constant, so that results do not depend on threads


class Rotator:
    """Turns one tensor after another, in float64 inside and `dtype` outside, chunks spread over the workers."""

    def __init__(
        self,
        source: Checkpoint,
        rotations: list[Rotation],
        workers: Workers,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source = source
        self.rotations = rotations
        self.workers = workers
        self.device = device
        self.dtype = dtype
        self.turned = turned_sites(source, rotations)
        # An online rotation stands behind what a site is made of, in front of those that read it.
        self.written = {site: rotation for site, rotation in self.turned.items() if not rotation.online}
        self.folded = set(folded_norms(source, rotations))

    def tensor(self, name: str) -> torch.Tensor:
        """The rotated tensor of that name."""
        if name in self.folded:
            return self.norm(name)
        linear = self.source.family.linear_of(name)
        if linear is None and name not in (EMBEDDING, OUTPUT):
            return self.source.read_float(name, self.dtype)
        weight = self.source.read(name if name in self.source else self.source.head())
        if name == EMBEDDING:
            # Its rows are vectors of the stream; at a boundary they turn when they are looked up.
            kept = any(rotation.site == "boundary" for rotation in self.rotations)
            return self._turn_columns(weight, None if kept else self.turned.get("residual"))
        if linear is not None:
            weight = self._turn_rows(weight, linear)
        place = place_of_reader(self.source, name)
        if place is None:
            return weight.to(self.dtype)
        gain = folded_gain(self.source, self.rotations, *place)
        gains = self.gain(gain).to(self.device) if gain else None
        return self._turn_columns(weight, self.turned.get(place[1]), gains)

    def norm(self, name: str) -> torch.Tensor:
        """What stays of a norm whose gain was folded."""
        return torch.ones(self.source.info(name).shape, dtype=self.dtype)

    def gain(self, name: str) -> torch.Tensor:
        """The gain to fold, float64."""
        return self.source.read_float(name, torch.float64)

    def turn(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """The rotation on the last axis."""
        return rotate_channels(x, rotation)

    def columns(self, part: torch.Tensor, rotation: Rotation | None, gain: torch.Tensor | None) -> torch.Tensor:
        """Some rows of a matrix whose columns meet the rotation's channels, with a gain before."""
        part = part if gain is None else part * gain
        return part if rotation is None else self.turn(part, rotation)

    def _turn_rows(self, weight: torch.Tensor, linear: Linear) -> torch.Tensor:
        """The weight (rows, cols) or bias (rows,) after turning the channels that its rows write, site by site."""
        parts = [(site, self.source.numbers.size(size)) for site, size in linear.parts] or [
            (linear.writes, len(weight))
        ]
        if not any(site in self.written for site, _ in parts):
            return weight
        turned = weight.to(torch.float64, copy=True)
        heads = turned.reshape(-1, sum(size for _, size in parts), max(1, turned[0].numel()))
        first = 0
        for site, size in parts:
            if site in self.written:
                self._turn_part(heads[:, first : first + size], self.written[site])
            first += size
        return turned

    def _turn_part(self, rows: torch.Tensor, rotation: Rotation) -> None:
        """Turn the channels of rows (heads, rows of a head, cols) in place."""
        shape = rows.shape

        def turn(first: int) -> None:
            part = rows[..., first : first + CHUNK].to(self.device).flatten(0, 1)
            rows[..., first : first + CHUNK] = self.turn(part.T, rotation).T.reshape(*shape[:2], -1).cpu()

        self.workers.run(turn, range(0, shape[2], CHUNK))

    def _turn_columns(
        self, weight: torch.Tensor, rotation: Rotation | None, gain: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The weight (rows, cols) after turning the channels that its columns meet, with a gain before."""
        out = torch.empty(weight.shape, dtype=self.dtype)

        def turn(first: int) -> None:
            part = weight[first : first + CHUNK].to(self.device, torch.float64)
            out[first : first + CHUNK] = self.columns(part, rotation, gain).to(self.dtype).cpu()

        self.workers.run(turn, range(0, weight.shape[0], CHUNK))
        return out
