"""Owns the other uses of what copies take: what a result must be compared with before anybody believes it.

    gains           the same branches scaled, without a second execution: on a small model 96 % of what a copy seemed
                    to win was that (gain_control.py)
    low rank        corrections of the worst matrices, L R, in as many bytes as the copies' parameters (low_rank.py)
    more bits       larger formats for the worst matrices, in as many bytes stored, or in as many bytes read a token
    finer groups    the same, by smaller groups alone, where the format has them

Corrections and gains are fitted with the steps that the copies got. All of them start from the tuned single copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from rondel.converters.lora import HALF_BYTES
from rondel.converters.replication import ATTENTION, FFN, Replication
from rondel.converters.tiles import TILE_FORMATS
from rondel.native.formats import decode, encode, feeds_back, format_bytes
from rondel.quant import low_rank
from rondel.quant.candidates import candidates
from rondel.quant.deficits import Deficit, deficits
from rondel.quant.descent import DescentConfig
from rondel.quant.factorization import factorize
from rondel.quant.feedback import feed_back
from rondel.quant.gain_control import fit_gains
from rondel.quant.low_rank import Factors
from rondel.quant.output_error import every
from rondel.quant.replication_cost import read_bytes, stored_bytes
from rondel.quant.student import Student
from rondel.quant.workers import Workers

WINDOWS = 16  # of the fitting text, by which matrices are compared
COMPARED = 32  # matrices that are rounded anew; the others lose less a byte
TRIED = 3  # larger formats of each of them
MOST_RANKS = 64  # of one matrix


@dataclass(frozen=True)
class Rival:
    """One other use of the bytes: weights in the place of the student's, and what they take beyond the student."""

    name: str
    bytes: int  # stored
    read: int  # a token
    weights: Mapping[str, torch.Tensor]
    changed: tuple[str, ...] = ()  # in words, one a matrix
    factors: Factors = field(default_factory=dict)


def _larger(format: str, shape: tuple[int, ...], budget: int, finer: bool) -> list[tuple[str, int]]:
    """The next formats above one, and what they take more, as far as the budget reaches; `finer`: of the same bits."""
    if format in TILE_FORMATS:
        bits = TILE_FORMATS[format].bits
        names = [n for n, tile in TILE_FORMATS.items() if shape[1] % tile.group == 0 and tile.bits >= bits]
        names = [n for n in names if not finer or TILE_FORMATS[n].bits == bits]
    else:
        names = [] if finer else [name for name in candidates(shape[1]) if name != "F16"]
    own = format_bytes(format, *shape)
    more = sorted((format_bytes(name, *shape) - own, name) for name in names)
    return [(name, extra) for extra, name in more if 0 < extra <= budget][:TRIED]


class Rivals:
    """The rivals of copies of one student, the tuned single copy, on token windows (n, context) to fit on."""

    def __init__(
        self, student: Student, teacher: Student, windows: torch.Tensor, config: DescentConfig, workers: Workers
    ) -> None:
        self.student, self.teacher, self.windows = student, teacher, windows
        self.config, self.workers = config, workers

    @cached_property
    def deficits(self) -> dict[str, Deficit]:
        """What each matrix lacks; empty where the teacher is another model than the student's original."""
        return deficits(self.student, self.teacher, every(self.windows, WINDOWS), self.workers)

    def gains(self, found: Replication) -> Rival:
        """The branches that `found` runs again, scaled and not run again; folds into norms and scales."""
        branches = {
            (step.layer, name)
            for step in found.steps
            for name, part in (("attn", ATTENTION), ("ffn", FFN))
            if step.number and step.parts & part
        }
        made = fit_gains(self.student, self.teacher, self.windows, branches, self.config, workers=self.workers)
        return Rival("gains", 0, 0, made, tuple(f"blk.{layer} {name}" for layer, name in sorted(branches)))

    def low_rank(self, budget: int) -> Rival | None:
        """The correction that so many bytes buy, fitted; None where they buy no rank of any matrix."""
        found = {
            name: low_rank.directions(one, min(MOST_RANKS, *one.stored.shape))
            for name, one in self.deficits.items()
            if HALF_BYTES * sum(one.stored.shape) <= budget
        }
        ranks = low_rank.spend(found, budget)
        if not ranks:
            return None
        opened = low_rank.factors(found, ranks)
        fitted = low_rank.refine(self.student, self.teacher, self.windows, opened, self.config, workers=self.workers)
        size = sum(found[name].bytes * rank for name, rank in ranks.items())
        changed = tuple(f"{name} rank {rank}" for name, rank in sorted(ranks.items()))
        return Rival("low rank", size, size, low_rank.corrected(self.student, fitted), changed, fitted)

    def more_bits(self, budget: int, name: str = "more bits", *, finer: bool = False) -> Rival | None:
        """Larger formats where they gain most a byte, to first order; `finer`: smaller groups alone."""
        offers = []
        for tensor, choices in self._worst(budget, finer).items():
            one, info = self.deficits[tensor], self.student.source.info(tensor)
            importance = one.moment.diagonal().float().cpu().numpy()
            for format, extra in choices:
                packed = encode(format, one.wanted.cpu().numpy(), importance)
                rounded = torch.from_numpy(decode(format, packed, *info.shape)).to(one.stored.device)
                offers.append((-one.gain(rounded - one.stored) / extra, tensor, format, extra, rounded))
        weights, changed, left = {}, [], budget
        for loss, tensor, format, extra, rounded in sorted(offers, key=lambda offer: offer[:3]):
            if loss < 0 and extra <= left and tensor not in weights:
                better = self._fed_back(tensor, format, rounded)
                weights[tensor], left = better.to(self.student.device, self.student.dtype), left - extra
                changed.append(f"{tensor} {format}")
        return Rival(name, budget - left, budget - left, weights, tuple(changed)) if weights else None

    def _fed_back(self, tensor: str, format: str, plain: torch.Tensor) -> torch.Tensor:
        """The matrix rounded with error feedback, as `quantize` would, where that misses less of its outputs."""
        one = self.deficits[tensor]
        if not feeds_back(format):
            return plain
        factor = factorize(one.moment.cpu().clone())
        packed = feed_back(one.wanted.cpu(), factor, format, self.workers)
        fed_back = torch.from_numpy(decode(format, packed, *plain.shape)).to(plain.device)
        return min(plain, fed_back, key=one.missed)

    def _worst(self, budget: int, finer: bool) -> dict[str, list[tuple[str, int]]]:
        """The matrices whose whole error costs most a byte of a larger format, and the formats that the budget buys."""
        found = {}
        for tensor, one in self.deficits.items():
            info = self.student.source.info(tensor)
            choices = _larger(info.format, info.shape, budget, finer)
            if choices:
                found[tensor] = one.gain(one.missing) / choices[0][1], choices
        kept = sorted(found, key=lambda tensor: (-found[tensor][0], tensor))[:COMPARED]
        return {tensor: found[tensor][1] for tensor in kept}

    def against(self, found: Replication) -> dict[str, Callable[[], Rival | None]]:
        """What makes each rival of these copies, by its name; None where their bytes buy nothing of the kind."""
        stored, read = stored_bytes(found), read_bytes(found, self.student.source)
        equal_reads = "more bits, equal reads"
        made: dict[str, Callable[[], Rival | None]] = {
            "gains": lambda: self.gains(found),
            "low rank": lambda: self.low_rank(stored),
            "more bits": lambda: self.more_bits(stored),
            "finer groups": lambda: self.more_bits(stored, "finer groups", finer=True),
            equal_reads: lambda: self.more_bits(read, equal_reads) if read > stored else None,
        }
        return made
