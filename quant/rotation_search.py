"""Owns the search for a rotation: its kind, the best of several seeds by what rounding loses, and the optimizers.

Everything starts from randomized Hadamards. A dense kind replaces those of its sites by matrices; online rotations and
the sites that the kind does not reach stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint, read_rotations
from rondel.converters.errors import RondelError
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.converters.rotation import HADAMARD, MATRICES, ORTHOGONAL, Rotation, matrix_name
from rondel.converters.stats import Stats, site_tensor
from rondel.native.formats import decode
from rondel.quant import optrot, procrustes
from rondel.quant.fallbacks import fitting
from rondel.quant.hadamard import hadamard_plan
from rondel.quant.mixtures import MIXTURES, mixture_named
from rondel.quant.optrot import Optimized
from rondel.quant.orthogonal import DENSE_SITES, dense_matrix, random_orthogonal, with_matrix
from rondel.quant.output_error import output_error, sampled
from rondel.quant.rotate_config import RotateConfig, rotations_of
from rondel.quant.rotated_stats import MovedStats
from rondel.quant.rotator import Rotator
from rondel.quant.rounding import round_matrix, six_digits
from rondel.quant.workers import Workers

OPTIMIZED = ("optrot", "dfrot")  # of the residual stream; the other sites keep their Hadamards
KINDS = (HADAMARD, ORTHOGONAL, *OPTIMIZED)
SAMPLED_EXPERTS = 4  # of a layer
SAMPLED_ROWS = 256  # of a matrix: its error is then known to a few percent, and seeds differ by more


@dataclass(frozen=True)
class Found:
    """Rotations with their matrices, and what the manifest tells of the search."""

    rotations: list[Rotation]
    told: dict[str, Any] = field(default_factory=dict)


def check_search(source: Checkpoint, config: RotateConfig, stats: Stats | None, rotations: list[Rotation]) -> None:
    """Refuse settings that no search can follow; `rotations` are the Hadamards to start from."""
    if config.kind not in KINDS:
        raise RondelError(f"--kind {config.kind}: expected one of {', '.join(KINDS)}")
    if config.tries < 1:
        raise RondelError(f"--tries {config.tries}: expected a positive number")
    if config.massive not in procrustes.MASSIVE_WEIGHTS:
        known = ", ".join(procrustes.MASSIVE_WEIGHTS)
        raise RondelError(f"--massive {config.massive}: expected one of {known}")
    _tried_format(config)
    if config.kind == HADAMARD:
        return
    online = [rotation.site for rotation in rotations if rotation.online]
    dense = [site for site in online if config.kind == ORTHOGONAL or site == "boundary"]
    if dense:
        raise RondelError(
            f"--kind {config.kind}: the rotation of {dense[0]} runs online, which only a Hadamard can; "
            "leave it out, or use --kind hadamard"
        )
    if config.kind in OPTIMIZED and not any(rotation.site == "residual" for rotation in rotations):
        raise RondelError(f"--kind {config.kind}: optimizes the rotation of the residual stream, which is left out")
    if config.kind == "dfrot" and (stats is None or stats.windows() is None):
        raise RondelError("--kind dfrot: needs text that the model can run on; use --stats with what calibrate wrote")


def _tried_format(config: RotateConfig) -> str:
    """The format of most matrices of the type: seeds are told apart by it."""
    mixture = mixture_named(config.type)
    return MIXTURES.get(mixture, mixture)


def planned(source: Checkpoint, config: RotateConfig, rotation: Rotation) -> dict[str, Any]:
    """Kind, block and cost that the rotation in the place of a Hadamard will have."""
    dense = ("residual",) if config.kind in OPTIMIZED else DENSE_SITES if config.kind == ORTHOGONAL else ()
    if rotation.site in dense:
        block = _dense_shape(source, rotation)[1]
        return {"kind": ORTHOGONAL, "block": block, "additions_per_channel": block}
    if rotation.kind == ORTHOGONAL:  # a pair of channels becomes another
        return {"kind": ORTHOGONAL, "block": rotation.block, "additions_per_channel": 1}
    hadamard = hadamard_plan(rotation.block)
    assert hadamard is not None
    return {"kind": HADAMARD, "block": rotation.block, "additions_per_channel": hadamard.additions}


def _dense_shape(source: Checkpoint, rotation: Rotation) -> tuple[int, int]:
    """How many matrices a dense rotation has, of how many channels."""
    # One matrix a key-value head: the query heads of its group read the same values.
    numbers = source.numbers
    return (numbers.kv_heads, numbers.value_dim) if rotation.site == "heads" else (1, rotation.size)


class RotationSearch:
    """The search that `config` asks for.

    Its result is the same for any number of threads. `check_search` has been called.
    """

    def __init__(
        self, source: Checkpoint, config: RotateConfig, stats: Stats | None, workers: Workers, device: str = "cpu"
    ) -> None:
        self.source = source
        self.config = config
        self.stats = stats
        self.workers = workers
        self.device = device

    def find(self, progress: Progress = silent) -> Found:
        """The rotations, with their matrices where they are dense."""
        told: dict[str, Any] = {}
        seed = self.config.seed
        if self.config.tries > 1:
            scores = self._scores(progress)
            seed = min(scores, key=lambda tried: (scores[tried], tried))
            measure = "fourth powers" if self.stats is None else f"output error at {_tried_format(self.config)}"
            tries = [{"seed": tried, "score": six_digits(score)} for tried, score in scores.items()]
            told = {"seed": seed, "measure": measure, "tries": tries}
        rotations = self._start(seed)
        if self.config.kind not in OPTIMIZED:
            return Found(rotations, told)
        start = next(rotation for rotation in rotations if rotation.site == "residual")
        best = self._optimized(rotations, dense_matrix(start), progress)
        told["objective"] = {"before": six_digits(best.before), "after": six_digits(best.after), "steps": best.steps}
        turned = with_matrix(start, best.matrix[None])
        return Found([turned if rotation is start else rotation for rotation in rotations], told)

    def kept(self, output: StageOutput, progress: Progress = silent) -> Found:
        """As `find`; matrices are written to `output`, and where an interrupted run left them, nothing is searched."""
        if output.done(MATRICES):
            left = output.result(MATRICES)
            path = output.partial / f"{MATRICES}.safetensors"
            return Found(read_rotations(path, left["rotations"]), left["told"])
        found = self.find(progress)
        dense = {i: rotation.matrix for i, rotation in enumerate(found.rotations) if rotation.matrix is not None}
        if dense:
            records = [rotation.to_json() for rotation in found.rotations]
            matrices = {matrix_name(i): matrix for i, matrix in dense.items()}
            output.write(MATRICES, matrices, {"rotations": records, "told": found.told})
        return found

    def _start(self, seed: int) -> list[Rotation]:
        """The Hadamards of a seed, with random orthogonal matrices in the place of some where that is the kind."""
        hadamards = rotations_of(self.source, replace(self.config, seed=seed))
        return [self._dense(one, seed) for one in hadamards] if self.config.kind == ORTHOGONAL else hadamards

    def _dense(self, rotation: Rotation, seed: int) -> Rotation:
        if rotation.site not in DENSE_SITES:
            return rotation
        count, block = _dense_shape(self.source, rotation)
        return with_matrix(rotation, random_orthogonal(count, block, seed, rotation.site))

    def _optimized(self, rotations: list[Rotation], start: torch.Tensor, progress: Progress) -> Optimized:
        if self.config.kind == "optrot":
            rows = optrot.weight_rows(self.source, rotations, self.workers)
            return optrot.optimize(rows, start, self.workers, progress)
        windows = self.stats.windows() if self.stats else None
        assert windows is not None
        tokens = procrustes.normed_tokens(self.source, windows, self.workers, self.device)
        return procrustes.optimize(tokens, start, self.config.massive, self.workers, progress)

    def _scores(self, progress: Progress) -> dict[int, float]:
        """What rounding loses behind the rotations that each seed starts from; less is better."""
        scores: dict[int, float] = {}
        for seed in range(self.config.seed, self.config.seed + self.config.tries):
            progress(len(scores), self.config.tries, "seeds")
            rotations = self._start(seed)
            rotator = Rotator(self.source, rotations, self.workers, device=self.device)
            moved = None if self.stats is None else MovedStats(self.source, self.stats, rotations, self.workers)
            losses = list(self._losses(rotator, moved))
            scores[seed] = sum(losses) / len(losses)
        return scores

    def _losses(self, rotator: Rotator, moved: MovedStats | None) -> Iterator[float]:
        """For every matrix of three layers: the output error with statistics, else the fourth powers."""
        family, layers = self.source.family, self.source.numbers.layers
        for layer in sorted({0, layers // 2, layers - 1}):  # the ends differ most from the rest
            for site in family.sites:
                seen = {} if moved is None else moved.site(layer, site)
                moment = seen.get(site_tensor(layer, site, "second_moment"))
                for linear in family.readers(site):
                    for name in list(linear.tensors(layer, self.source.numbers))[:SAMPLED_EXPERTS]:
                        weights = rotator.tensor(name)
                        yield optrot.fourth_powers(weights) if moment is None else self._error(name, weights, moment)

    def _error(self, name: str, weights: torch.Tensor, moment: torch.Tensor) -> float:
        """tr(E H E^T) / tr(W H W^T) for the error E of rounding some rows of W to nearest."""
        rows = sampled(weights, SAMPLED_ROWS)
        format = fitting(_tried_format(self.config), rows.shape[1])
        packed = round_matrix(name, rows, format, None, self.workers.threads).packed
        return output_error(rows, torch.from_numpy(decode(format, packed, *rows.shape)), moment, self.workers)
