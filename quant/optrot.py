"""Owns OptRot: the rotation of the residual stream that makes the sum of fourth powers of the weights small.

OptRot (arXiv 2512.24124) minimizes L(R) = sum ||W R||_4^4 over the matrices W that read the stream, with their norms'
gains folded in, and sum ||R^T W||_4^4 over those that write it: weights without outliers round better. No data. Here
all of them are the rows of one matrix A, thinned out evenly, and L(R) = sum (A R)^4. Other than in the paper, each
matrix counts as if its mean square were one: what rounding loses is relative to the matrix. Without that the embedding,
whose weights are often the largest, would gain at the cost of all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import EMBEDDING, OUTPUT
from rondel.converters.progress import Progress, silent
from rondel.converters.rotation import Rotation
from rondel.quant.fold import folded_gain, place_of_reader, turned_sites
from rondel.quant.orthogonal import orthonormalized
from rondel.quant.rotator import Rotator
from rondel.quant.workers import Workers

# Eight rows a column of R leave little to fit by chance; more rows cost time and change the result by a percent.
ROWS_PER_CHANNEL = 8
FEWEST_ROWS = 16384
STEPS = 200  # twice as many gain another 2 % of the objective
# Steps are angles: the largest rotation of any channel in a step, in radians. The first one is safe from any start.
FIRST_STEP, LARGEST_STEP, SMALLEST_STEP = 0.1, 1.0, 1e-6
GROW, SHRINK = 1.5, 0.5
ENOUGH = 1e-4  # relative fall in ten steps below which more steps are not worth their time
PATIENCE = 10
CHUNK = 512  # rows that one worker multiplies at a time; a constant, so that results do not depend on threads


@dataclass(frozen=True)
class Optimized:
    """A rotation that was searched for, with the objective at its start and its end, relative to normal weights."""

    matrix: torch.Tensor  # (d, d) float64, orthogonal
    before: float
    after: float
    steps: int


def _stream_matrices(source: Checkpoint, residual: Rotation) -> Iterator[tuple[str, str | None, bool]]:
    """Every matrix that reads or writes the residual stream, the gain it folds in, and whether it writes."""
    turned = turned_sites(source, [residual])
    for name in dict.fromkeys([*source.names(), OUTPUT]):
        linear, place = source.family.linear_of(name), place_of_reader(source, name)
        if name == EMBEDDING:
            yield name, None, False
        elif place is not None and place[1] in turned:
            yield name, folded_gain(source, [residual], *place), False
        elif linear is not None and linear.writes == residual.site and name.endswith(".weight"):
            yield name, None, True


def weight_rows(source: Checkpoint, rotations: list[Rotation], workers: Workers) -> torch.Tensor:
    """Rows of all matrices that the rotation of the residual stream turns, (n, d) float32: an even selection of them.

    They stand as the other rotations leave them, which turn the other side of some.
    """
    residual = next(rotation for rotation in rotations if rotation.site == "residual")
    rotator = Rotator(source, [rotation for rotation in rotations if rotation is not residual], workers)
    width = source.numbers.width
    matrices = list(_stream_matrices(source, residual))
    stored = [name if name in source else source.head() for name, _, _ in matrices]
    total = sum(math.prod(source.info(name).shape) // width for name in stored)
    stride = max(1, total // max(FEWEST_ROWS, ROWS_PER_CHANNEL * width))
    kept, passed = [], 0
    for name, gain, writes in matrices:
        weight = rotator.tensor(name)
        vectors = weight.T if writes else weight
        rows = vectors[-passed % stride :: stride].to(torch.float64)
        passed += len(vectors)
        if gain is not None:
            rows = rows * source.read_float(gain, torch.float64)
        size = float(rows.square().mean().sqrt()) if len(rows) else 0.0
        kept.append((rows / size if size > 0 else rows).to(torch.float32))
    return torch.cat(kept)


def gaussian_powers(rows: torch.Tensor) -> float:
    """The sum of fourth powers that normal entries of one variance would have, with the energy of `rows`."""
    square = float(rows.square().sum(dtype=torch.float64)) / rows.numel()
    return max(3 * square**2 * rows.numel(), torch.finfo(torch.float64).tiny)


def fourth_powers(rows: torch.Tensor) -> float:
    """sum w^4 relative to `gaussian_powers`: 1 for normal weights, more for heavier tails."""
    return float(rows.square().square().sum(dtype=torch.float64)) / gaussian_powers(rows)


def _objective(rows: torch.Tensor, rotation: torch.Tensor, workers: Workers) -> float:
    narrow = rotation.to(torch.float32)

    def powers(first: int) -> float:
        return float((rows[first : first + CHUNK] @ narrow).square().square().sum(dtype=torch.float64))

    return sum(workers.map(powers, range(0, len(rows), CHUNK)))


def _gradient(rows: torch.Tensor, rotation: torch.Tensor, workers: Workers) -> torch.Tensor:
    """4 A^T (A R)^3, (d, d) float64, summed over the chunks in their order."""
    narrow = rotation.to(torch.float32)

    def part(first: int) -> torch.Tensor:
        chunk = rows[first : first + CHUNK]
        turned = chunk @ narrow
        return chunk.T @ (turned.square() * turned)

    total = torch.zeros(rotation.shape, dtype=torch.float64)
    for found in workers.map(part, range(0, len(rows), CHUNK)):
        total += found
    return 4 * total


def _cayley(rotation: torch.Tensor, direction: torch.Tensor, step: float) -> torch.Tensor:
    """R (I - tS/2)^-1 (I + tS/2) for a skew-symmetric S: orthogonal again, and R (I + tS) to first order."""
    half = direction * (step / 2)
    eye = torch.eye(len(half), dtype=torch.float64)
    return rotation @ torch.linalg.solve(eye - half, eye + half)


def optimize(rows: torch.Tensor, start: torch.Tensor, workers: Workers, progress: Progress = silent) -> Optimized:
    """Descend from `start` (d, d) in conjugate directions of the orthogonal group, each step by Cayley's transform.

    A step that does not lower the objective is halved and tried again, so the objective never rises. The result is the
    same for any number of threads.
    """
    rotation = start.to(torch.float64)
    history = [_objective(rows, rotation, workers)]
    direction, last, step = None, None, FIRST_STEP
    scale = gaussian_powers(rows)
    for _ in range(STEPS):
        progress(len(history) - 1, STEPS, "optrot")
        turned = rotation.T @ _gradient(rows, rotation, workers)
        slope = (turned - turned.T) / 2  # the gradient along the group, as a skew-symmetric matrix
        if direction is None or last is None:
            direction = -slope
        else:
            # Polak and Ribiere's factor, never negative: it falls back to the gradient by itself.
            factor = max(0.0, float((slope * (slope - last)).sum() / last.square().sum()))
            direction = factor * direction - slope
            if float((direction * slope).sum()) >= 0:
                direction = -slope
        last = slope
        norm = float(direction.norm(dim=1).max())
        if norm == 0:
            break
        while step >= SMALLEST_STEP:
            moved = _cayley(rotation, direction, step / norm)
            objective = _objective(rows, moved, workers)
            if objective < history[-1]:
                break
            step *= SHRINK
        else:
            break
        rotation, step = moved, min(step * GROW, LARGEST_STEP)
        history.append(objective)
        if len(history) > PATIENCE and history[-1 - PATIENCE] - history[-1] < ENOUGH * history[-1]:
            break
    matrix = orthonormalized(rotation)
    return Optimized(matrix, history[0] / scale, _objective(rows, matrix, workers) / scale, len(history) - 1)
