"""The report of `rondel replicate --report`: its facts, and the page that draws loss against compute and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rondel.cli.candidates import compared
from rondel.cli.console import size
from rondel.cli.report import number, page

WIDTH, HEIGHT = 460, 280  # of a chart, in pixels
TOP, RIGHT, BOTTOM, LEFT = 14, 34, 34, 62
INSIDE = 12  # pixels from the axis to what costs nothing
LINE = 12  # pixels of a label's height
MARGIN = 0.08  # of the range of the losses, above and below
TICKS = 4
MODEL = ("as it was", "tuned", "base path")  # rows of `compared` that are the model itself

Axis = Callable[[float], float]  # a share of the width
Point = dict[str, Any]


def facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the page tells, from the manifest of a folder that replicate wrote."""
    stage = manifest["stages"][-1]
    result = stage["result"]
    choice = result.get("choice", {})
    return {
        "model": manifest["source"]["name"],
        "family": manifest["family"],
        "version": stage["version"],
        "config": stage["config"],
        "bytes": result.get("bytes"),
        "compared": compared(result) if "losses" in result else [],
        "tuning": result.get("tuning"),
        "copies": result.get("kl"),
        "bases": choice.get("bases", []),
        "log": result.get("log", []),
        "replicated": "replication" in manifest,
        "notes": result["notes"],
        "warnings": result.get("warnings", []),
    }


def render(told: Mapping[str, Any]) -> str:
    """The page of the facts."""
    decided = [_decided(row) for row in told["compared"] if row["bytes"] is not None]
    tried = [_tried(entry) for entry in told["log"] if entry["kl"] is not None]
    if tried:
        tried = [*map(_without, told["bases"]), *tried]
    return page("replication.html", told=told, decided=_charts(decided), tried=_charts(tried))


def _decided(row: Mapping[str, Any]) -> Point:
    kind = "model" if row["name"] in MODEL else "copies" if row["name"] == "copies" else "rival"
    what = f"{row['name']}: KL {number(row['kl'])}, {size(row['bytes'])} and {row['compute']:.1%} of compute more"
    return {**row, "kind": kind, "label": row["name"], "title": what}


def _without(base: Mapping[str, Any]) -> Point:
    name = "tuned" if base["tuned"] else "as it was"
    title = f"{name}, without copies: KL {number(base['kl'])}"
    return {"kind": "model", "bytes": 0, "compute": 0.0, "kl": base["kl"], "label": name, "title": title}


def _tried(entry: Mapping[str, Any]) -> Point:
    plan = " ".join(entry["plan"]) + ("" if entry.get("tuned", True) else ", not tuned")
    kind = "copies" if entry["accepted"] else "rejected"
    title = (
        f"{plan}: KL {number(entry['kl'])}, {number(entry['control_kl'])} with gains alone; {entry['why'] or 'kept'}"
    )
    return {**entry, "kind": kind, "label": plan if entry["accepted"] else "", "title": title}


def _charts(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Loss against compute and against bytes, or nothing where there are no points."""
    if not points:
        return []
    most = max(*(point["compute"] for point in points), 0.01)
    powers = range(math.ceil(math.log10(1 + max(*(point["bytes"] for point in points), 9))) + 1)
    last = powers[-1]
    compute = [{"at": share, "text": f"+{share:.0%}"} for share in _steps(0.0, most)]
    bytes_ = [
        {"at": 10.0**power if power else 0.0, "text": f"+{size(10**power).replace('.00', '')}" if power else "0"}
        for power in powers
    ]
    return [
        _chart("compute", "compute of the layers", points, compute, lambda value: value / most),
        _chart("bytes", "bytes of the file", points, bytes_[::2], lambda value: math.log10(1 + value) / last),
    ]


def _chart(
    key: str, name: str, points: Sequence[Point], marks: Iterable[Mapping[str, Any]], axis: Axis
) -> dict[str, Any]:
    losses = [point["kl"] for point in points]
    room = MARGIN * (max(losses) - min(losses)) or 0.1 * max(losses) or 1.0
    low, high = min(losses) - room, max(losses) + room

    def x(value: float) -> float:
        return round(LEFT + INSIDE + axis(value) * (WIDTH - LEFT - INSIDE - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    return {
        "name": name,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "rows": [{"y": y(value), "text": number(value)} for value in _steps(low, high) if low <= value <= high],
        "columns": [{"x": x(mark["at"]), "text": mark["text"]} for mark in marks],
        "points": _placed([(point, x(point[key]), y(point["kl"])) for point in points]),
    }


def _placed(points: Iterable[tuple[Point, float, float]]) -> list[dict[str, Any]]:
    """The points with their labels, towards the middle and below one another where they would overlap."""
    free: dict[bool, float] = {}  # where the next label of a side may stand
    found = []
    for point, x, y in sorted(points, key=lambda place: place[2]):
        right = x > (LEFT + WIDTH) / 2
        text_y = max(y + 4, free.get(right, 0.0))
        if point["label"]:
            free[right] = text_y + LINE
        found.append(
            {
                **{key: point[key] for key in ("kind", "label", "title")},
                "x": x,
                "y": y,
                "text_x": x + (-8 if right else 8),
                "text_y": round(text_y, 1),
                "anchor": "end" if right else "start",
            }
        )
    return found


def _steps(low: float, high: float) -> list[float]:
    """About TICKS round numbers that cover a range."""
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step)
    return [round(step * index, 12) for index in range(first, math.ceil(high / step) + 1) if step * index <= high]
