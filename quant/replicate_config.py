"""Owns the settings of the stage replicate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReplicateConfig:
    """Which layers run more than once, and how; what is below `strict` has a meaning with a teacher and text alone."""

    layers: tuple[str, ...] = ()  # specifications, see replication_plan.py; none: copies are chosen
    gate: float | None = None  # of unfitted copies whose specification has none; None: 1 in a mean, else 0.1
    kv: Literal["own", "shared"] | None = None  # keys and values of copies; None: own if serial, shared if parallel
    strict: bool = False  # refuse readers that would run the base path alone
    context: int | None = None  # tokens of a window; None: 512, or the model's context where that is shorter
    tokens: int = 524288  # the most to fit and to decide with
    steps: int = 150  # of every optimization
    mode: Literal["auto", "serial", "parallel", "mixed", "none"] = "auto"  # of chosen copies
    candidates: tuple[int, ...] | None = None  # layers that may have chosen copies; None: all
    parts: Literal["auto", "block", "attn", "ffn"] = "auto"  # that chosen copies run
    passes: int = 1  # chosen copies of a layer at most
    merge: Literal["sum", "mean", "weighted_sum"] | None = None  # of chosen parallel copies; None: sum
    search: Literal["screen", "grid", "bayes", "evolve"] = "screen"
    budget_evals: int = 24  # plans to fit at most
    max_layers: int = 2  # with chosen copies
    max_compute: float = 1.0  # of chosen copies, as a share of what all layers compute
    max_kv: int | None = None  # KV caches beyond the model's own; None: any number
    tune: bool | None = None  # the single copy first; None: where there is a teacher and text
    prefer: Literal["none", "replicate", "low-rank"] = "none"  # where another use of the copies' bytes is better
    allow_regression: bool = False
    seed: int = 0
    target: str | None = None
