"""The page of `rotate --report`: where its pictures put the facts of `rondel.quant.rotation_report.report_of`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rondel.cli.report import number, page

HEIGHT, TOP, BOTTOM, LEFT = 170, 8, 22, 54  # of a chart, in pixels; the axes stand at the left and below
SLOT, WIDEST = 30, 72  # pixels of a layer: at least, and where there are few
ROW = 400  # pixels that the layers take where there are few
DECADES = 6  # below the largest value; what is smaller lies on the axis
ROOM = 28  # token positions that fit into a picture
CELL, GAP = 24, 2  # pixels of a layer's cell for a token position
BASES = {"before": -6, "after": 6}  # pixels from the middle of a layer's slot
LINES = {"magnitude_99_9": "rule", "massive_from": "limit"}  # what the chart of magnitudes connects, and its class


def render(told: Mapping[str, Any]) -> str:
    """The page."""
    from rondel.quant.rotation_report import STREAM

    choice = told["choice"] if told["choice"] and "tensors" in told["choice"] else None
    sites = [site | {"chart": box_chart(site["layers"])} for site in told["sites"]]
    return page(
        "rotation.html",
        told=told,
        choice=choice,
        way=choice["chosen"].replace("_", " ") if choice else "",
        stream=next((site for site in sites if site["name"] == STREAM), None),
        sites=[site for site in sites if site["name"] != STREAM],
        tensors=[kind | {"chart": box_chart(kind["layers"])} for kind in told["tensors"]],
        magnitudes=_magnitudes(told["stream"]),
        positions=_positions(told["stream"]),
    )


class _Scale:
    """A logarithmic axis over some values, whole decades long."""

    def __init__(self, values: Iterable[float]) -> None:
        positive = [value for value in values if value > 0 and math.isfinite(value)]
        self.high = math.ceil(math.log10(max(positive, default=1.0)))
        self.low = min(math.floor(math.log10(min(positive, default=1.0))), self.high - 1)
        self.low = max(self.low, self.high - DECADES)

    def place(self, value: float) -> float:
        """Pixels from the top."""
        power = math.log10(value) if value > 0 else self.low
        share = (min(max(power, self.low), self.high) - self.low) / (self.high - self.low)
        return round(TOP + (1 - share) * (HEIGHT - TOP - BOTTOM), 1)

    def ticks(self) -> list[dict[str, Any]]:
        """A line for each decade."""
        powers = range(self.low, self.high + 1)
        return [{"y": self.place(10.0**power), "text": f"{10.0**power:g}"} for power in powers]


def _axes(scale: _Scale, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    named = [{"x": _x(index, layers), "text": _layer(one["layer"])} for index, one in enumerate(layers)]
    step = max(1, math.ceil(len(named) / 40))
    return {
        "width": LEFT + _slot(layers) * len(layers) + 8,
        "height": HEIGHT,
        "left": LEFT,
        "ticks": scale.ticks(),
        "layers": named[::step],
    }


def _slot(layers: Sequence[object]) -> int:
    return min(max(ROW // max(len(layers), 1), SLOT), WIDEST)


def _x(index: int, layers: Sequence[object]) -> float:
    return LEFT + _slot(layers) * (index + 0.5)


def _layer(layer: int | None) -> str:
    return "end" if layer is None else str(layer)


def box_chart(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each layer and basis: a line from the least to the most, a box of the quartiles, the median."""
    shown = [(index, layer["layer"], basis, layer[basis]) for index, layer in enumerate(layers) for basis in BASES]
    shown = [one for one in shown if one[3] is not None]
    scale = _Scale(value for *_, found in shown for value in found.values())
    boxes = []
    for index, layer, basis, found in shown:
        place = {name: scale.place(value) for name, value in found.items()}
        values = ", ".join(f"{name} {number(value)}" for name, value in found.items())
        where = "outside the layers" if layer is None else f"layer {layer}"
        boxes.append(
            {"x": _x(index, layers) + BASES[basis], "basis": basis, **place, "title": f"{where}, {basis}: {values}"}
        )
    return _axes(scale, layers) | {"boxes": boxes}


def _magnitudes(stream: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Behind each layer: both rules' magnitudes as lines, and the largest massive activation where there is one."""
    if not stream:
        return None
    largest = [abs(one["massive_activations"][0]["value"]) if one["massive_activations"] else None for one in stream]
    lines = {key: [(index, one[key]) for index, one in enumerate(stream) if key in one] for key in LINES}
    scale = _Scale([*filter(None, largest), *(value for points in lines.values() for _, value in points)])
    return _axes(scale, stream) | {
        "lines": [
            {
                "kind": LINES[key],
                "points": " ".join(f"{_x(index, stream):g},{scale.place(value):g}" for index, value in points),
            }
            for key, points in lines.items()
        ],
        "dots": [
            {
                "x": _x(index, stream),
                "y": scale.place(value),
                "title": f"layer {stream[index]['layer']}: {number(value)}",
            }
            for index, value in enumerate(largest)
            if value is not None
        ],
    }


def _positions(stream: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A grid of layers and token positions: the share of the largest 0.1 %, and what is massive there."""
    cells = [(index, layer, place) for index, layer in enumerate(stream) for place in _of_layer(layer).items()]
    if not cells:
        return None
    weights: dict[int, float] = {}
    for _, _, (position, found) in cells:
        weights[position] = weights.get(position, 0.0) + found["share"] + len(found["massive"])
    shown = sorted(sorted(weights, key=lambda position: (-weights[position], position))[:ROOM])
    columns = {position: LEFT + index * CELL for index, position in enumerate(shown)}
    drawn = [
        _cell(index, layer, position, found) | {"x": columns[position]}
        for index, layer, (position, found) in cells
        if position in columns
    ]
    return {
        "width": LEFT + CELL * len(columns),
        "height": CELL * len(stream) + BOTTOM,
        "left": LEFT,
        "size": CELL - GAP,
        "columns": [{"x": x + (CELL - GAP) / 2, "text": position} for position, x in columns.items()],
        "rows": [{"y": index * CELL + CELL * 0.65, "text": layer["layer"]} for index, layer in enumerate(stream)],
        "cells": drawn,
        "hidden": len(weights) - len(columns),
    }


def _of_layer(layer: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """By token position, its share of the largest 0.1 % and its massive activations, the largest first."""
    found: dict[int, dict[str, Any]] = {}
    for place in layer.get("positions_99_9", []):
        found[place["position"]] = {"share": place["share"], "massive": []}
    for massive in layer["massive_activations"]:
        found.setdefault(massive["position"], {"share": 0.0, "massive": []})["massive"].append(massive)
    return found


def _cell(index: int, layer: Mapping[str, Any], position: int, found: Mapping[str, Any]) -> dict[str, Any]:
    massive = found["massive"]
    title = f"layer {layer['layer']}, position {position}: {number(100 * found['share'])} % of the largest 0.1 %"
    if massive:
        title += f"; {len(massive)} massive, {number(massive[0]['value'])} in channel {massive[0]['channel']}"
    return {
        "y": index * CELL,
        "opacity": round(0.08 + 0.92 * min(found["share"], 1.0), 3),
        "massive": bool(massive),
        "title": title,
    }
