"""Owns how statistics follow a rotation: H' = R^T D^-1 H D^-1 R, with D the norm gain that folding took out.

Largest values a channel cannot follow a change of basis, so they are dropped; second moments follow exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.output import StageOutput
from rondel.converters.rotation import Rotation
from rondel.converters.stats import MOVED, OUTPUT_IN, TEXT, WINDOWS, Stats, site_tensor
from rondel.quant.fold import folded_gain, turned_sites
from rondel.quant.hadamard import rotate_channels
from rondel.quant.workers import Workers

CHUNK = 256  # rows that one worker turns at a time


def _places(source: Checkpoint) -> list[tuple[int | None, str]]:
    inside = [(layer, site) for layer in range(source.numbers.layers) for site in source.family.sites]
    return [*inside, (None, OUTPUT_IN)]


def check_movable(source: Checkpoint, stats: Stats, rotations: list[Rotation]) -> None:
    """Refuse statistics that are not of this model, or that cannot follow these rotations."""
    stats.check_basis(source)
    turned = turned_sites(source, rotations)
    for layer, site in _places(source):
        if not stats.has(layer, site) or site not in turned:
            continue
        if not stats.has(layer, site, "second_moment"):
            raise RondelError(
                f"{stats.root}: holds only diagonals, which cannot follow a rotation; "
                "calibrate without --diagonal, or calibrate the rotated model"
            )
        gain = folded_gain(source, rotations, layer, site)
        if gain and not bool(source.read(gain).all()):
            raise RondelError(
                f"{source.root}: {gain} holds a gain of zero, so statistics behind it cannot follow a rotation; "
                "rotate without --stats and calibrate the rotated model"
            )


def move_second_moment(
    moment: torch.Tensor, rotation: Rotation, gain: torch.Tensor | None, workers: Workers
) -> torch.Tensor:
    """R^T D^-1 H D^-1 R of a second moment H (d, d), float64, exactly symmetric."""
    scale = torch.ones(len(moment), dtype=torch.float64) if gain is None else 1 / gain.to(torch.float64)

    def half(matrix: torch.Tensor) -> torch.Tensor:
        turned = torch.empty(matrix.shape, dtype=torch.float64)

        def turn(first: int) -> None:
            part = matrix[first : first + CHUNK].to(torch.float64) * scale
            turned[first : first + CHUNK] = rotate_channels(part, rotation)

        workers.run(turn, range(0, len(matrix), CHUNK))
        return turned

    # D^-1 and R act on the columns in each half; the transpose in between brings the rows to their turn.
    moved = half(half(moment).T)
    return (moved + moved.T) / 2


class MovedStats:
    """The statistics of `source` in the basis that `rotations` make; `check_movable` has been called."""

    def __init__(self, source: Checkpoint, stats: Stats, rotations: list[Rotation], workers: Workers) -> None:
        self.source = source
        self.stats = stats
        self.rotations = rotations
        self.workers = workers
        self._turned = turned_sites(source, rotations)

    def site(self, layer: int | None, site: str) -> dict[str, torch.Tensor]:
        """The tensors of one site; one that no rotation touches keeps all it has."""
        rotation = self._turned.get(site)
        moment = self.stats.second_moment(layer, site)
        if rotation is None or moment is None:
            kept = (site_tensor(layer, site, what) for what in ("second_moment", "diagonal", "absmax", "count"))
            return {name: self.stats.read(name) for name in kept if name in self.stats}
        gain = folded_gain(self.source, self.rotations, layer, site)
        gains = self.source.read(gain) if gain else None
        moved = move_second_moment(moment, rotation, gains, self.workers).to(torch.float32)
        return {
            site_tensor(layer, site, "second_moment"): moved,
            site_tensor(layer, site, "diagonal"): moved.diagonal().clone(),
            site_tensor(layer, site, "count"): self.stats.read(site_tensor(layer, site, "count")),
        }

    def write(self, folder: Path, record: dict[str, Any]) -> None:
        """Write `folder`/stats, one shard a block; an interrupted run goes on."""
        output = StageOutput(folder / MOVED, record)
        if output.finished:
            return
        shards: dict[str, list[tuple[int | None, str]]] = {}
        for layer, site in _places(self.source):
            if self.stats.has(layer, site):
                shards.setdefault("output" if layer is None else f"blk-{layer:05d}", []).append((layer, site))
        for shard, places in shards.items():
            if not output.done(shard):
                output.write(shard, {name: tensor for place in places for name, tensor in self.site(*place).items()})
        if WINDOWS in self.stats:
            shards[TEXT] = []
            if not output.done(TEXT):
                output.write(TEXT, {WINDOWS: self.stats.read(WINDOWS)})
        manifest = {
            key: value for key, value in self.stats.manifest.items() if key not in ("tensors", "manifest_version")
        }
        if any(rotation.site == "residual" for rotation in self.rotations):
            # Tokens keep their norms; which channels are massive belongs to the old basis.
            norms = {layer: {"token_norm": seen["token_norm"]} for layer, seen in manifest.get("residual", {}).items()}
            manifest["residual"] = norms
        manifest["rotations"] = [rotation.to_json() for rotation in self.rotations]
        manifest["stages"] = [*self.stats.manifest.get("stages", []), record]
        output.finish(list(shards), manifest)
