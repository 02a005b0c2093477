"""Owns the search over plans of copies by Optuna's samplers, behind one way to propose plans and observe their worth.

A plan is a set of layers, a mode, parts and a number of passes for all of them. `grid` visits each in a seeded order,
`bayes` models what was observed by a tree-structured Parzen estimator (Bergstra et al. 2011), `evolve` crosses and
mutates the best (NSGA-II, Deb et al. 2002, with one objective). Gains and gates are not searched: every plan is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

from rondel.converters.progress import Progress, part_of
from rondel.quant.choice_config import ChoiceConfig
from rondel.quant.copy_plan import Copy, CopyPlan
from rondel.quant.judgement import DELTA
from rondel.quant.plan_trials import PlanTrials, TriedPlan, log_entry
from rondel.quant.replication_cost import model_bytes
from rondel.quant.screening import MODES, Screened

if TYPE_CHECKING:
    import optuna

NONE = "-"  # of a place for a layer that stays empty
BOTH = "both"  # a parallel and a serial copy of each layer
STARTUP = 3  # a third of the budget is drawn before a model is trusted
MOST_SUGGESTED = 4  # plans that screening puts first
POPULATION = 8
PROPOSALS = 20  # times the budget, after which a sampler that repeats itself has ended


class Proposals:
    """Proposes plans one after another; what each is worth is observed before the next is asked for.

    `first`: copies to propose first, as far as the sampler takes advice.
    """

    def __init__(self, config: ChoiceConfig, layers: int, first: Sequence[Copy] = ()) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config = config
        self._allowed = set(config.copies(layers))
        self._axes = _grid_axes(config, layers) if config.search == "grid" else _axes(config, layers)
        self._left = math.prod(len(choices) for choices in self._axes.values())
        self._study = optuna.create_study(sampler=_sampler(config, self._axes))
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.CategoricalDistribution(choices) for name, choices in self._axes.items()
        }
        self._asked: optuna.trial.Trial | None = None
        if config.search != "grid":
            for copy in first[:MOST_SUGGESTED]:
                told = {"mode": copy.mode, "parts": copy.parts, "passes": 1, "layer 1": str(copy.layer)}
                self._study.enqueue_trial({name: told.get(name, NONE) for name in self._axes})

    def propose(self) -> tuple[Copy, ...] | None:
        """The copies of the next plan, in order; None where a grid has no more."""
        if self.config.search == "grid" and self._left == 0:
            return None
        self._asked = self._study.ask(self._distributions)
        self._left -= 1
        told = self._asked.params
        places = told["layers"].split(",") if "layers" in told else [told[name] for name in told if "layer" in name]
        modes = MODES if told["mode"] == BOTH else (told["mode"],)
        return tuple(
            sorted(
                copy
                for layer in {int(place) for place in places if place not in (NONE, "")}
                for mode in modes
                for _ in range(told["passes"])
                if (copy := Copy(layer, mode, told["parts"])) in self._allowed
            )
        )

    def observe(self, value: float) -> None:
        """What the proposed plan is worth: smaller is better."""
        assert self._asked is not None, "a plan is proposed first"
        if self.config.search != "grid" or self._left:  # the sampler of a grid wants to end a loop with the last one
            self._study.tell(self._asked, value)
        self._asked = None


def _plain_axes(config: ChoiceConfig) -> dict[str, list[Any]]:
    modes = [*config.modes, BOTH] if config.mode == "mixed" else list(config.modes)
    return {"mode": modes, "parts": list(config.kinds), "passes": list(range(1, config.passes + 1))}


def _layers(config: ChoiceConfig, layers: int) -> list[int]:
    return sorted({copy.layer for copy in config.copies(layers)})


def _axes(config: ChoiceConfig, layers: int) -> dict[str, list[Any]]:
    """A place for each layer that a plan may have; equal places are one."""
    names = [NONE, *(str(layer) for layer in _layers(config, layers))]
    places = min(config.max_layers, len(names) - 1)
    return {**{f"layer {place}": names for place in range(1, places + 1)}, **_plain_axes(config)}


def _grid_axes(config: ChoiceConfig, layers: int) -> dict[str, list[Any]]:
    """Sets of layers, as large ones as the budget can visit all of: single layers at least."""
    plain, single = _plain_axes(config), _layers(config, layers)
    others = math.prod(len(choices) for choices in plain.values())
    most = next(
        (
            size
            for size in range(min(config.max_layers, len(single)), 1, -1)
            if others * sum(math.comb(len(single), n) for n in range(1, size + 1)) <= config.budget_evals
        ),
        1,
    )
    sets = chain.from_iterable(combinations(single, n) for n in range(1, most + 1))
    return {"layers": [",".join(map(str, one)) for one in sets] or [""], **plain}


def _sampler(config: ChoiceConfig, axes: Mapping[str, Sequence[Any]]) -> optuna.samplers.BaseSampler:
    import optuna

    if config.search == "grid":
        return optuna.samplers.GridSampler(axes, seed=config.seed)
    if config.search == "bayes":
        startup = max(1, config.budget_evals // STARTUP)
        return optuna.samplers.TPESampler(n_startup_trials=startup, multivariate=True, seed=config.seed)
    return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=config.seed)


def search(
    trials: PlanTrials,
    promising: Sequence[Screened],
    config: ChoiceConfig,
    log: list[dict[str, Any]],
    progress: Progress,
) -> TriedPlan | None:
    """The plan that is worth most of those that help, by fitting `config.budget_evals` at most; each goes to `log`."""
    first = [Copy(one.layer, one.mode, one.parts) for one in promising]
    proposals = Proposals(config, trials.student.layers, first)
    worth: dict[tuple[Copy, ...], float] = {}
    helped: list[tuple[float, TriedPlan, dict[str, Any]]] = []
    size = model_bytes(trials.student.source)
    for _ in range(PROPOSALS * config.budget_evals):
        copies = proposals.propose() if trials.fits < config.budget_evals else None
        if copies is None:
            break
        if copies not in worth:
            told = part_of(
                progress, trials.fits, config.budget_evals, f"searching the plans of copies: {config.search}"
            )
            plan = trials.plan(copies)
            why, tried = config.failure(plan), None
            value = trials.base["kl"] + (DELTA if why else 0.0)
            if copies and not why:
                tried = trials.measure(copies, told)
                value, why = tried.kl, tried.failure(trials.base["kl"])
            worth[copies] = value + _price(plan, size)
            if copies:
                log.append(log_entry(plan, config.search, tried=tried, why=why))
            if tried and not why:
                helped.append((worth[copies], tried, log[-1]))
        proposals.observe(worth[copies])
    helped.sort(key=lambda one: one[0])
    for _, _, entry in helped[1:]:
        entry |= {"accepted": False, "why": "another plan is worth more"}
    return helped[0][1] if helped else None


def _price(plan: CopyPlan, size: int) -> float:
    """Nats that a plan must win for what it costs: DELTA for twice the compute, and for twice the bytes."""
    return DELTA * (plan.compute + plan.bytes / size)
