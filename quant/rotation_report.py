"""What `rotate` did to the channels of every site and class of tensors: the data behind its report.

A channel of a site is measured by the root mean square of its activations, one of a class of tensors by its largest
weight over the rows of a matrix. Outliers are channels far above the median; rotating makes all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import EMBEDDING, OUTPUT, OUTPUT_NORM, block_tensor
from rondel.converters.rotation import Rotation
from rondel.converters.stats import OUTPUT_IN, Stats, site_tensor, stats_for
from rondel.quant.fold import folded_gain
from rondel.quant.output_error import digits
from rondel.quant.rotate_checks import validate
from rondel.quant.rotate_config import RotateConfig
from rondel.quant.rotated_stats import MovedStats
from rondel.quant.rotation_search import RotationSearch
from rondel.quant.rotator import Rotator
from rondel.quant.workers import Workers

QUARTILES = {"least": 0.0, "low": 0.25, "median": 0.5, "high": 0.75, "most": 1.0}
STREAM = "residual"  # the residual stream between a norm and its gain, in front of every layer and of the head

Place = tuple[int | None, str]  # layer (None: outside the blocks), and site or class of tensors
Channels = Callable[[Place], torch.Tensor | None]  # not negative (channels,); None where there are none


def ranges(channels: torch.Tensor) -> dict[str, float]:
    """The least, the quartiles and the most of some channels (n,)."""
    ordered = channels.to(torch.float64).sort().values
    return {name: digits(float(ordered[round(share * (len(ordered) - 1))])) for name, share in QUARTILES.items()}


def report_of(
    source: Checkpoint, made: Checkpoint, config: RotateConfig, stats: Stats | None, *, threads: int | None = None
) -> dict[str, Any]:
    """The facts of a folder `made` that rotate wrote of `source`, with `stats` or without.

    Where the model was left as it is because rotating does not pay, "after" is what it would have become. "sites" and
    "tensors" have the ranges of channels, layer by layer; "peak" is the largest ratio of a layer's largest channel to
    its median one. "stream" has what calibrate told of the residual stream, and "missing" a sentence for each part that
    there was no data for, with what to give.
    """
    layers = range(source.numbers.layers)
    stream: list[Place] = [*((layer, STREAM) for layer in layers), (None, STREAM)]
    sites: list[Place] = [(layer, site) for site in source.family.sites for layer in layers]
    classes: list[Place] = [(layer, linear.role) for linear in source.family.linears for layer in layers]
    with Workers(threads) as workers:
        rotations = _considered(source, made, config, stats, workers)
        activations, weights = _after(source, made, rotations, stats, workers)
        told = {
            "sites": _compared([*stream, *sites, (None, OUTPUT_IN)], _seen(source, stats, []), activations),
            "tensors": _compared([*classes, (None, "token_embd"), (None, "output")], _weights(source), weights),
        }
    choice, measured = made.manifest.get("rotation_choice"), _stream(stats)
    return {
        "model": source.manifest.get("source", {}).get("name", ""),
        "family": source.family.name,
        "version": made.stages[-1]["version"],
        "config": made.stages[-1]["config"],
        "turned": bool(made.rotations),
        "rotations": [_described(rotation) for rotation in rotations],
        "calibration_tokens": stats.calibration.get("tokens") if stats else None,
        "missing": _missing(config, stats, choice, measured),
        "choice": choice,
        **told,
        "stream": measured,
    }


def _missing(
    config: RotateConfig, stats: Stats | None, choice: dict[str, Any] | None, stream: list[dict[str, Any]]
) -> list[str]:
    told = []
    if config.rotate == "never":
        told.append("Nothing was to turn (--rotate never); --rotate auto shows what rotating would do.")
    elif stats and not (choice and "tensors" in choice):
        told.append(f"Nothing was decided (--rotate {config.rotate}); --rotate auto measures what rotating gains.")
    if stats is None:
        told.append(
            "Activations, massive ones and the decision need text that the model ran on: "
            "give --stats with the folder that rondel calibrate writes."
        )
    elif not stream:
        told.append(f"{stats.root} tells nothing of massive activations; run rondel calibrate again.")
    return told


def _considered(
    source: Checkpoint, made: Checkpoint, config: RotateConfig, stats: Stats | None, workers: Workers
) -> list[Rotation]:
    """The rotations that were made, or that were measured and not made; these are searched for again."""
    if made.rotations or config.rotate == "never":
        return made.read_rotations()
    validate(source, replace(config, rotate="always"), stats)
    return RotationSearch(source, config, stats, workers).find().rotations


def _after(
    source: Checkpoint, made: Checkpoint, rotations: list[Rotation], stats: Stats | None, workers: Workers
) -> tuple[Channels, Channels]:
    """Activations and weights in the new basis, which was written or only considered."""
    if made.rotations:
        return _seen(source, stats_for(made, None) if stats else None, rotations), _weights(made)
    if not rotations:
        return (lambda place: None), (lambda place: None)
    rotator = Rotator(source, rotations, workers)
    moved = MovedStats(source, stats, rotations, workers) if stats else None

    def diagonal(layer: int | None, site: str) -> torch.Tensor | None:
        return moved.site(layer, site).get(site_tensor(layer, site, "diagonal")) if moved else None

    return _channels(source, diagonal, rotations), _weights(source, rotator)


def _described(rotation: Rotation) -> dict[str, Any]:
    told = rotation.to_json()
    return {key: told[key] for key in ("site", "kind", "online", "size", "block", "seed")}


def _compared(places: Iterable[Place], before: Channels, after: Channels) -> list[dict[str, Any]]:
    """By site or class, the ranges of each layer in both bases; None for a basis that there is not."""
    found: dict[str, list[dict[str, Any]]] = {}
    for place in places:
        channels = {"before": before(place), "after": after(place)}
        if any(values is not None for values in channels.values()):
            told = {basis: None if values is None else ranges(values) for basis, values in channels.items()}
            found.setdefault(place[1], []).append({"layer": place[0], **told})
    return [{"name": name, "peak": _peaks(layers), "layers": layers} for name, layers in found.items()]


def _peaks(layers: list[dict[str, Any]]) -> dict[str, float | None]:
    def peak(basis: str) -> float | None:
        told = [layer[basis] for layer in layers if layer[basis] and layer[basis]["median"] > 0]
        return max((digits(found["most"] / found["median"]) for found in told), default=None)

    return {basis: peak(basis) for basis in ("before", "after")}


def _seen(source: Checkpoint, stats: Stats | None, rotations: list[Rotation]) -> Channels:
    """The activations of statistics that stand in the basis of `rotations`."""

    def diagonal(layer: int | None, site: str) -> torch.Tensor | None:
        return stats.diagonal(layer, site) if stats is not None and stats.has(layer, site) else None

    return _channels(source, diagonal, rotations)


def _channels(
    source: Checkpoint, diagonal: Callable[[int | None, str], torch.Tensor | None], rotations: list[Rotation]
) -> Channels:
    """Root mean squares of a site; for STREAM those in front of the norm's gain, where it was not folded before."""
    first = next(norm for norm in source.family.norms if norm.reads == "residual" and norm.makes)

    def channels(place: Place) -> torch.Tensor | None:
        layer, site = place
        ahead, gain = (OUTPUT_IN, OUTPUT_NORM) if layer is None else (first.makes, block_tensor(layer, first.role))
        found = diagonal(layer, str(ahead) if site == STREAM else site)
        if found is None or site != STREAM or folded_gain(source, rotations, layer, str(ahead)):
            return None if found is None else found.sqrt()
        gains = source.read_float(gain, torch.float64)
        return torch.where(gains == 0, 0.0, found.to(torch.float64).sqrt() / gains.abs())

    return channels


def _weights(model: Checkpoint, rotator: Rotator | None = None) -> Channels:
    """The largest weight of every column; of a layer's experts the first one's. A tied head is the embedding.

    With a rotator, those that the model's matrices would turn into.
    """

    def channels(place: Place) -> torch.Tensor | None:
        layer, role = place
        names = [EMBEDDING if role == "token_embd" else OUTPUT]
        if layer is not None:
            linear = next(linear for linear in model.family.linears if linear.role == role)
            names = list(linear.tensors(layer, model.numbers))[:1]
        untied = rotator is not None and role == "output" and OUTPUT_IN in rotator.turned
        if not names or not (names[0] in model or untied):
            return None
        weights = model.read(names[0]) if rotator is None else rotator.tensor(names[0])
        return weights.abs().amax(0).to(torch.float32)

    return channels


def _stream(stats: Stats | None) -> list[dict[str, Any]]:
    """What calibrate told of the residual stream behind each layer."""
    told = stats.manifest.get("residual", {}) if stats else {}
    layers = [(int(name.rpartition(".")[2]), seen) for name, seen in told.items()]
    return [{"layer": layer, **seen} for layer, seen in sorted(layers) if "massive_activations" in seen]
