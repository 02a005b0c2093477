"""Owns what the matrices of a model see while it is quantized: site after site, behind what is rounded already.

Where a matrix is rounded, everything in front of it is rounded already, so it can make up for what that lost. The float
model may run beside it: its outputs are what the rounded matrices should make. Every window runs on one thread and
windows are added in their order, so threads do not change a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import EMBEDDING, Linear
from rondel.converters.stats import OUTPUT_IN
from rondel.quant.activations import CrossSums, SiteSums
from rondel.quant.model_stream import ModelStream
from rondel.quant.workers import Workers

HELD_OUT = 8  # every eighth window is kept out of the moments, to judge by
FEWEST_WINDOWS = 2  # one to learn from, one to judge by
GROUP = 8  # windows between two additions to the sums, or more where there are more threads
QUANTIZED, FLOAT = "hidden-states", "hidden-states-float"  # folders of the streams, while the stage runs


@dataclass(frozen=True)
class Moments:
    """Means over the tokens of the windows to learn from, (d, d) float64."""

    second: torch.Tensor  # of x x^T: x is what the matrices of the site will read
    cross: torch.Tensor | None  # of y x^T: y is what they read in the float model


@dataclass(frozen=True)
class Judged:
    """Sums of squares over the windows held out: of the outputs wanted of a matrix, and of what candidates miss."""

    wanted: float
    missed: tuple[float, ...]


def split_windows(count: int) -> tuple[list[int], list[int]]:
    """The windows to learn from and those held out: the last of every eight, or the last of fewer."""
    held_out = list(range(HELD_OUT - 1, count, HELD_OUT)) or [count - 1]
    return [window for window in range(count) if window not in held_out], held_out


class SequentialRun:
    """A model on token windows (n, context), layer by layer, while its matrices are replaced by rounded ones.

    `sequential=False` replaces none: everything is measured on the float model. `asymmetric` runs the float model
    beside the other one, and takes its outputs for the ones wanted.
    """

    def __init__(
        self,
        source: Checkpoint,
        windows: torch.Tensor,
        folder: Path,
        workers: Workers,
        *,
        sequential: bool = True,
        asymmetric: bool = False,
        device: str = "cpu",
    ) -> None:
        self.source = source
        self.sequential = sequential
        self.layer = 0
        self._learnt, self._held_out = split_windows(len(windows))
        self._workers = workers
        self._device = device
        self._stream = ModelStream(source, windows, folder / QUANTIZED, device)
        beside = sequential and asymmetric
        self._float = ModelStream(source, windows, folder / FLOAT, device) if beside else None
        self._streams = [self._stream, *([self._float] if self._float else [])]

    def kept(self, layer: int) -> bool:
        """Whether an interrupted run left all it takes to go on before `layer`."""
        return all(stream.kept(layer) for stream in self._streams)

    def begin(self, embedding: Iterable[tuple[slice, torch.Tensor]] | None = None) -> None:
        """Stand before the first layer. `embedding`: the rounded one (vocabulary, width), some rows at a time."""
        self.layer = 0
        original = self.source.read(EMBEDDING)
        whole = [(slice(0, len(original)), original)]
        self._stream.begin(embedding if self.sequential and embedding is not None else whole)
        if self._float:
            self._float.begin(whole)

    def resume(self, layer: int) -> None:
        """Stand before a layer whose states are `kept`."""
        self.layer = layer
        for stream in self._streams:
            stream.resume(layer)

    def enter(self) -> None:
        """Load the layer, or behind the last one the output norm."""
        if self.layer == self.source.numbers.layers:
            for stream in self._streams:
                stream.enter_output()
            return
        weights = self._stream.read()
        for stream in self._streams:
            stream.enter(weights)

    def replace(self, linear: Linear, weights: torch.Tensor) -> None:
        """Put rounded weights (rows, cols) F32 in the place of a matrix of the layer."""
        if self.sequential:
            self._stream.replace(linear, weights)

    def leave(self) -> None:
        """Pass all windows through the layer, and stand before the next one."""
        for stream in self._streams:
            stream.open()
            self._workers.run(stream.advance, range(len(stream.windows)))
            stream.leave()
        self.layer += 1

    def _place(self, site: str) -> tuple[int | None, int]:
        """The layer for messages, and the number of channels."""
        if site == OUTPUT_IN:
            return None, self.source.numbers.width
        return self.layer, self.source.numbers.size(self.source.family.readers(site)[0].cols)

    def moments(self, site: str) -> Moments:
        """What the readers of a site see, on the windows to learn from. Refuses activations that are not finite."""
        layer, size = self._place(site)
        second = SiteSums(size, diagonal=False, device=self._device)
        cross = CrossSums(size, self._device) if self._float else None
        step = max(GROUP, self._workers.threads)
        for first in range(0, len(self._learnt), step):
            windows = self._learnt[first : first + step]
            seen = list(self._workers.map(lambda window: self._inputs(window, site), windows))
            second.add([x for x, _ in seen], self._workers)
            if cross:
                cross.add([(y, x) for x, y in seen if y is not None], self._workers)
        return Moments(second.mean(layer, site), cross.mean(layer, site) if cross else None)

    def judge(
        self, site: str, matrices: Mapping[str, tuple[torch.Tensor, Sequence[torch.Tensor]]]
    ) -> dict[str, Judged]:
        """Compare candidates for readers of a site on the windows held out.

        `matrices`: by name the float weights (rows, cols) and the candidates, all F32. Wanted is what the float weights
        make of the float model's activations where it runs beside, else of those that the candidates see.
        """
        placed = {
            name: (weights.to(self._device), [one.to(self._device) for one in candidates])
            for name, (weights, candidates) in matrices.items()
        }

        def squares(window: int) -> dict[str, list[float]]:
            x, y = self._inputs(window, site)
            return {name: _squares(x, x if y is None else y, *matrix) for name, matrix in placed.items()}

        sums = list(self._workers.map(squares, self._held_out))
        totals = {name: [sum(found) for found in zip(*(one[name] for one in sums), strict=True)] for name in matrices}
        return {name: Judged(total[0], tuple(total[1:])) for name, total in totals.items()}

    def _inputs(self, window: int, site: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._stream.inputs(window, site), self._float.inputs(window, site) if self._float else None

    def remove(self) -> None:
        """Delete what lies on disk."""
        for stream in self._streams:
            stream.remove()


def _squares(
    x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, candidates: Sequence[torch.Tensor]
) -> list[float]:
    """Sums of squares of y W^T, and of y W^T - x Q^T for every candidate Q."""
    wanted = y @ weights.T
    missed = [wanted - x @ candidate.T for candidate in candidates]
    return [float(made.square().sum(dtype=torch.float64)) for made in (wanted, *missed)]
