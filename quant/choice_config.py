"""Owns the settings of the automatic choice of copies, and which copies they allow."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from rondel.converters.errors import RondelError
from rondel.quant.copy_plan import Copy, CopyPlan
from rondel.quant.screening import MODES, PARTS


@dataclass(frozen=True)
class ChoiceConfig:
    """What may be chosen, how it is looked for, and how it is fitted."""

    mode: Literal["auto", "serial", "parallel", "mixed"] = "auto"  # auto: one of both a layer; mixed: may have both
    candidates: tuple[int, ...] | None = None  # layers that may have copies; None: all
    parts: Literal["auto", "block", "attn", "ffn"] = "auto"  # that copies run
    passes: int = 1  # copies of a layer at most
    merge: Literal["sum", "mean", "weighted_sum"] | None = None  # of parallel copies; None: sum
    kv: Literal["own", "shared"] | None = None  # keys and values; None: own if serial, shared if parallel
    search: Literal["screen", "grid", "bayes", "evolve"] = "screen"
    budget_evals: int = 24  # plans to fit at most
    max_layers: int = 2  # with copies
    max_compute: float = 1.0  # of the copies, as a share of what all layers compute
    max_kv: int | None = None  # KV caches beyond the model's own; None: any number
    strict: bool = False  # refuse readers that would run the base path alone
    steps: int = 150  # of every optimization
    seed: int = 0  # of the windows' order, the bootstrap and the search

    @classmethod
    def of(cls, config: Any) -> ChoiceConfig:
        """The settings that a stage's configuration has under the same names, and defaults for the others."""
        return cls(**{one.name: getattr(config, one.name) for one in fields(cls) if hasattr(config, one.name)})

    @property
    def modes(self) -> tuple[str, ...]:
        """Of single copies."""
        return (self.mode,) if self.mode in MODES else MODES

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts that single copies may run."""
        return (self.parts,) if self.parts in PARTS else PARTS

    @property
    def copies_a_layer(self) -> int:
        """The most of one layer."""
        return max(self.passes, 2) if self.mode == "mixed" else self.passes

    def copies(self, layers: int) -> list[Copy]:
        """Every single copy that a choice may consist of; in a mean only whole blocks stand side by side."""
        candidates = range(layers) if self.candidates is None else sorted(set(self.candidates))
        return [
            Copy(layer, mode, part)
            for layer in candidates
            for mode in self.modes
            for part in self.kinds
            if self.merge != "mean" or mode == "serial" or part == "block"
        ]

    def check(self, layers: int) -> None:
        """Refuse candidates that a model of so many layers does not have."""
        missing = sorted(set(self.candidates or ()) - set(range(layers)))
        if missing:
            raise RondelError(f"layer {missing[0]} cannot have copies: the model has the layers 0 to {layers - 1}")

    def failure(self, plan: CopyPlan) -> str | None:
        """Which cap a plan exceeds, in a sentence; None: none."""
        if len(plan.layers) > self.max_layers:
            return f"{len(plan.layers)} layers with copies, at most {self.max_layers} are allowed"
        if plan.compute > self.max_compute:
            return f"{plan.compute:.3f} of the layers' compute on top, at most {self.max_compute:g} is allowed"
        if self.max_kv is not None and plan.kv_slots > self.max_kv:
            return f"{plan.kv_slots} more KV caches, at most {self.max_kv} are allowed"
        if plan.most_copies > self.copies_a_layer:
            return f"{plan.most_copies} copies of a layer, at most {self.copies_a_layer} are allowed"
        return None
