"""Owns plans of copies that are chosen rather than written: their steps, where their fit starts, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch

from rondel.converters.lora import HALF_BYTES
from rondel.converters.replication import ATTENTION, MERGES, Replication
from rondel.quant.distill import opening_sets
from rondel.quant.replication_cost import extra_compute
from rondel.quant.replication_plan import PARTS, Specification, assemble
from rondel.quant.screening import SHARPER
from rondel.quant.student import Student


class PlanConfig(Protocol):
    """What of a ReplicateConfig decides how chosen copies are put together."""

    @property
    def merge(self) -> str | None:
        """Of parallel copies; None: sum."""
        ...

    @property
    def kv(self) -> Literal["own", "shared"] | None:
        """Whose keys and values copies use; None: own if serial, shared if parallel."""
        ...

    @property
    def strict(self) -> bool:
        """Whether readers must run the copies."""
        ...


@dataclass(frozen=True, order=True)
class Copy:
    """One more execution of a layer or a part of it."""

    layer: int
    mode: str  # "serial", "parallel"
    parts: str  # "block", "attn", "ffn"

    def __str__(self) -> str:
        return f"{self.layer}:{self.mode}:1:{self.parts}"

    def branches(self) -> list[tuple[int, str]]:
        """What it runs again."""
        return [(self.layer, part) for part in ("attn", "ffn") if self.parts in ("block", part)]


class CopyPlan:
    """Copies put together on a student, with closed gates; in a mean with open ones, which changes as little."""

    def __init__(self, copies: Sequence[Copy], student: Student, config: PlanConfig) -> None:
        self.copies, self.student = tuple(sorted(copies)), student
        merge = config.merge or "sum"
        chosen: dict[int, list[Specification]] = {}
        for mode in ("parallel", "serial"):
            for copy in self.copies:
                if copy.mode == mode:
                    gate, merged = (1.0, "mean") if (mode, merge) == ("parallel", "mean") else (0.0, merge)
                    one = Specification(
                        copy.layer, mode, 1, merged if mode == "parallel" else "none", PARTS[copy.parts], gate, 1.0
                    )
                    chosen.setdefault(copy.layer, []).append(one)
        self.replication: Replication = assemble(chosen, student.numbers, kv=config.kv, strict=config.strict)

    def opening(self) -> list[dict[str, torch.Tensor]]:
        """Where a fit starts. Parallel attention on shared keys asks more sharply, or it would repeat its layer's."""
        closed = [{kind: torch.from_numpy(values) for kind, values in one.items()} for one in self.replication.sets]
        sets = opening_sets(self.student, self.replication, closed)
        for step in self.replication.steps:
            alone = self.replication.merges[step.group] == 0
            if step.number and step.parts & ATTENTION and not alone:
                mean = self.replication.merges[step.group] == MERGES.index("mean")
                heads = torch.full((self.student.numbers.heads,), 1.0 if mean else SHARPER)
                sets[step.parameters - 1]["q_head_gain"] = heads.to(self.student.device, self.student.dtype)
        return sets

    @property
    def layers(self) -> list[int]:
        """That have copies."""
        return sorted({copy.layer for copy in self.copies})

    @property
    def most_copies(self) -> int:
        """Of one layer."""
        return max(Counter(copy.layer for copy in self.copies).values(), default=0)

    def branches(self) -> list[tuple[int, str]]:
        """What runs more than once, (layer, "attn" or "ffn") each."""
        return sorted({branch for copy in self.copies for branch in copy.branches()})

    @cached_property
    def compute(self) -> float:
        """Weights that copies multiply by, as a share of those of all layers."""
        return extra_compute(self.replication, self.student.source)

    @cached_property
    def bytes(self) -> int:
        """Of the parameters of the copies."""
        return HALF_BYTES * sum(values.numel() for one in self.opening() for values in one.values())

    @property
    def kv_slots(self) -> int:
        """Caches of keys and values beyond the model's own."""
        return self.replication.slots() - self.student.layers
