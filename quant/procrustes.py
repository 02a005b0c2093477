"""Owns DFRot: a rotation of the residual stream behind which the normalized activations round to few levels well.

DFRot (arXiv 2412.00648): for the tokens x behind the norms, minimize sum w^2 ||x R - Q(x R)||^2 in turns. With R
fixed, B = Q(X R); with B fixed, R is a weighted orthogonal Procrustes problem (Schoenemann, 1966), solved by one
singular value decomposition. Massive tokens are few, and round in another way, so they have a weight of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import EMBEDDING, OUTPUT_NORM, block_tensor
from rondel.converters.progress import Progress, silent
from rondel.converters.stats import OUTPUT_IN
from rondel.quant.model_stream import ModelStream
from rondel.quant.optrot import FEWEST_ROWS, ROWS_PER_CHANNEL, Optimized
from rondel.quant.orthogonal import orthonormalized
from rondel.quant.workers import Workers

TOKENS = 2048  # of text, as published: more change little
LEVELS = 7  # four bits, symmetric, as published: at eight there is next to nothing to gain
CLIPS = (1.0, 0.85, 0.7)  # scales to choose from, as parts of the one that holds the largest magnitude
ALTERNATIONS = 100  # as published
ENOUGH = 2e-3  # relative fall of the loss in ten alternations below which more are not worth their time
PATIENCE = 10
MASSIVE = 100.0  # a token is massive where one channel is so many times the mean magnitude of its channels
MASSIVE_WEIGHTS = {"keep": 1.0, "weight": 100.0, "ignore": 0.0}  # gamma = 100 as published
CHUNK = 512  # rows that one worker handles at a time; a constant, so that results do not depend on threads


@dataclass(frozen=True)
class NormedTokens:
    """Tokens behind the norms without their gains, (n, d) float32, and which of them are massive, (n,) bool."""

    rows: torch.Tensor
    massive: torch.Tensor


def normed_tokens(source: Checkpoint, windows: torch.Tensor, workers: Workers, device: str) -> NormedTokens:
    """What every norm of the residual stream makes of the first TOKENS tokens of `windows` (n, context).

    An even selection of the tokens of all norms, and of the massive ones all.
    """
    numbers = source.numbers
    norms = {norm.makes: norm.role for norm in source.family.norms if norm.makes and norm.reads == "residual"}
    windows = windows[: -(-TOKENS // windows.shape[1])]
    total = windows.numel() * (numbers.layers * len(norms) + 1)
    stride = max(1, total // max(FEWEST_ROWS, ROWS_PER_CHANNEL * numbers.width))
    kept: list[torch.Tensor] = []
    passed = 0
    with TemporaryDirectory() as folder:
        stream = ModelStream(source, windows, Path(folder) / "states", device)

        def take(site: str, norm: str) -> None:
            nonlocal passed
            gain = source.read_float(norm)
            for x in workers.map(lambda window: stream.inputs(window, site).cpu(), range(len(windows))):
                rows = torch.where(gain == 0, 0.0, x / gain)  # no reader sees a channel of gain 0
                wanted = massive_rows(rows)
                wanted[-passed % stride :: stride] = True
                kept.append(rows[wanted])
                passed += len(rows)

        original = source.read(EMBEDDING)
        stream.begin([(slice(0, len(original)), original)])
        for layer in range(numbers.layers):
            stream.enter(stream.read())
            for site, role in norms.items():
                take(site, block_tensor(layer, role))
            stream.open()
            workers.run(stream.advance, range(len(windows)))
            stream.leave()
        stream.enter_output()
        take(OUTPUT_IN, OUTPUT_NORM)
    rows = torch.cat(kept)
    return NormedTokens(rows, massive_rows(rows))


def massive_rows(rows: torch.Tensor) -> torch.Tensor:
    """Which tokens (n, d) have a channel MASSIVE times the mean magnitude of their channels, (n,) bool."""
    magnitudes = rows.abs()
    return magnitudes.amax(1) > MASSIVE * magnitudes.mean(1)


def rounded(turned: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (n, d) on a grid of 2 LEVELS + 1 levels, a scale a token: the rounded ones and their scales (n, 1).

    `scales` (n, 1) are those of the turn before. They stay among the candidates: then no turn can be worse than it.
    """
    largest = turned.abs().amax(1, keepdim=True) / LEVELS
    best, chosen, least = torch.zeros_like(turned), scales, torch.full_like(largest, torch.inf)
    for candidate in (scales, *(largest * clip for clip in CLIPS)):
        step = torch.where(candidate > 0, candidate, 1.0)
        levels = (turned / step).round().clamp(-LEVELS, LEVELS) * step
        error = (levels - turned).square().sum(1, keepdim=True)
        better = error < least
        best, chosen = torch.where(better, levels, best), torch.where(better, step, chosen)
        least = torch.where(better, error, least)
    return best, chosen


class Alternation:
    """The two steps in turns: `loss` of the rotation, which `turn` replaces by a better one."""

    def __init__(self, rows: torch.Tensor, weights: torch.Tensor, start: torch.Tensor, workers: Workers) -> None:
        self.rotation = start.to(torch.float64)  # (d, d)
        self._rows, self._squares = rows, weights.to(torch.float64).square()[:, None]
        self._scales = torch.zeros(len(rows), 1, dtype=torch.float64)
        self._workers = workers
        self.loss, self._cross = self._round()

    def _round(self) -> tuple[float, torch.Tensor]:
        """The weighted loss of the rotation, and Y^T W^2 B of the turned tokens Y and the rounded ones B, (d, d)."""

        def part(first: int) -> tuple[float, torch.Tensor]:
            chunk = slice(first, first + CHUNK)
            turned = self._rows[chunk].to(torch.float64) @ self.rotation
            levels, self._scales[chunk] = rounded(turned, self._scales[chunk])
            weighted = turned * self._squares[chunk]
            return float(((levels - turned).square() * self._squares[chunk]).sum()), weighted.T @ levels

        loss, cross = 0.0, torch.zeros_like(self.rotation)
        for lost, product in self._workers.map(part, range(0, len(self._rows), CHUNK)):
            loss += lost
            cross += product
        return loss, cross

    def turn(self) -> None:
        """Solve the Procrustes problem for the rounded tokens, and round again."""
        left, _, right = torch.linalg.svd(self._cross)
        self.rotation = self.rotation @ (left @ right)
        self.loss, self._cross = self._round()


def optimize(
    tokens: NormedTokens, start: torch.Tensor, massive: str, workers: Workers, progress: Progress = silent
) -> Optimized:
    """Alternate from `start` (d, d) until the loss hardly falls; `massive` is a key of MASSIVE_WEIGHTS.

    The objective is told as loss over energy. The result is the same for any number of threads.
    """
    weights = torch.where(tokens.massive, MASSIVE_WEIGHTS[massive], 1.0)
    used = weights > 0
    rows, weights = tokens.rows[used], weights[used]
    energy = float((rows.to(torch.float64).square().sum(1) * weights.to(torch.float64).square()).sum())
    run = Alternation(rows, weights, start, workers)
    history, best = [run.loss], run.rotation
    for _ in range(ALTERNATIONS):
        progress(len(history) - 1, ALTERNATIONS, "dfrot")
        run.turn()
        if run.loss >= history[-1]:
            break
        history.append(run.loss)
        best = run.rotation
        if len(history) > PATIENCE and history[-1 - PATIENCE] - history[-1] < ENOUGH * history[-1]:
            break
    return Optimized(orthonormalized(best), history[0] / energy, history[-1] / energy, len(history) - 1)
