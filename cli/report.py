"""Reports: one HTML page that needs nothing beside it, or the same facts as JSON; and that of `quantize --report`."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rondel.cli.console import size
from rondel.converters.errors import RondelError
from rondel.converters.manifest import PLAIN

SUFFIXES = (".html", ".json")
LEVELS = 9  # colours of the heat map, h0 to h8 in the template
FORMAT_COLOURS = 9  # f0 to f8, from few bits to many
# How many layers leave room for a text in every cell: on a phone, on a screen.
FEW, SOME = 4, 12
OPTIONS = {"tensors": "tensor"}  # settings whose option has another name


def check_report(path: Path, *, dry_run: bool = False) -> None:
    """Refuse a report that could not be written, before the long work."""
    if dry_run:
        raise RondelError("--report tells of a model that was written; leave out --dry-run")
    if path.suffix not in SUFFIXES:
        raise RondelError(f"--report {path}: expected a name that ends in .html or .json")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise RondelError(f"--report {path}: cannot be written there; give a file in a folder that exists")


def write_report(path: Path, told: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str]) -> None:
    """Write the facts of a report: as the page that `render` makes of them, or as JSON, by the suffix."""
    text = render(told) if path.suffix == ".html" else json.dumps(told, indent=1) + "\n"
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError as error:
        raise RondelError(f"--report {path}: cannot be written: {error.strerror}") from error


def page(name: str, **facts: Any) -> str:
    """The page of a template beside this file. Names come from files of others: everything is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "percent": percent, "count": count, "number": number}
    return environment.get_template(name).render(**facts)


def render(told: Mapping[str, Any]) -> str:
    """The page of `rondel.quant.report.report_of`."""
    from rondel.quant.report import asked_for

    tensors, colours = told["tensors"], _format_colours(told["formats"])
    # The embedding is rounded so finely that the layers would all look alike beside it.
    inside = [tensor for tensor in tensors if tensor["layer"] is not None]
    errors = [tensor["output_error"] for tensor in inside if tensor.get("output_error")]
    low, high = min(errors, default=0.0), max(errors, default=0.0)
    cells = [tensor | _cell(tensor, colours, low, high) for tensor in tensors]
    return page(
        "report.html",
        told=told,
        wanted=asked_for(told["config"]),
        command=command(told["config"], calibrated=told["calibration_tokens"] is not None),
        colours=colours,
        map=_map(cells),
        outside=[cell for cell in cells if cell["layer"] is None and "output_error" in cell],
        rows=cells,
        low=low,
        high=high,
        methods=any(tensor.get("method") for tensor in tensors),
        held_out=any(tensor.get("held_out_error") for tensor in tensors),
    )


def command(config: Mapping[str, Any], *, calibrated: bool) -> str:
    """The command that these settings come from, as far as they differ from the defaults."""
    from dataclasses import asdict

    from rondel.quant.quantize import QuantizeConfig

    words = ["rondel quantize MODEL", *(["--stats calib/"] if calibrated else [])]
    defaults = asdict(QuantizeConfig())
    for key, value in config.items():
        option = "--" + OPTIONS.get(key, key).replace("_", "-")
        if key == "type" and value is not None:
            words.append(f"--type {shlex.quote(str(value))}")
        elif value == defaults.get(key) or value in (None, [], False):
            continue
        elif value is True:
            words.append(option)
        elif key == "tensors":
            words += [f"{option} {shlex.quote('='.join(map(str, pair)))}" for pair in value]
        else:
            words.append(f"{option} {shlex.quote(str(value))}")
    return " ".join(words)


def percent(share: float) -> str:
    """Two digits of a share: "6.9 %", "0.028 %"."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 else f"{float(f'{value:.2g}'):g} %"


def number(value: float | None) -> str:
    """A measured number, four digits of it; nothing where nothing was measured."""
    if value is None:
        return ""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def count(total: int) -> str:
    """A large number for people: "3.67 M"."""
    value = float(total)
    for unit in ("", " k", " M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} G"


def _format_colours(formats: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour class for each format, by its bits a weight; plain numbers are grey."""
    packed = [total for total in formats if total["format"] not in PLAIN]
    packed.sort(key=lambda total: total["bytes"] / total["weights"])
    step = (FORMAT_COLOURS - 1) / max(len(packed) - 1, 1)
    colours = {total["format"]: f"f{round(place * step)}" for place, total in enumerate(packed)}
    return colours | {total["format"]: "plain" for total in formats if total["format"] in PLAIN}


def _cell(tensor: Mapping[str, Any], colours: Mapping[str, str], low: float, high: float) -> dict[str, Any]:
    """What the pictures show of a tensor."""
    error, parts = tensor.get("output_error"), [f"{tensor['format']}, {tensor['bits_per_weight']:.3g} bits a weight"]
    if error is not None:
        parts.append(f"error {percent(error)}")
    if tensor.get("method"):
        parts.append(str(tensor["method"]))
    tried = tensor.get("held_out_error", {})
    level = 0
    if error and high > low:
        place = math.log(error / low) / math.log(high / low)
        level = round((LEVELS - 1) * min(max(place, 0), 1))
    return {
        "title": f"{tensor['name']}: {', '.join(parts)}",
        "colour": colours[tensor["format"]],
        "level": f"h{level}",
        "not_kept": {how: other for how, other in tried.items() if how != tensor.get("method")},
        "bar": round(100 * min(error / high, 1), 1) if error and high else 0,
    }


def _map(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The quantized matrices by role and layer, None where a layer has none, and how much text fits."""
    inside = [cell for cell in cells if cell["layer"] is not None and "output_error" in cell]
    layers = 1 + max((cell["layer"] for cell in inside), default=-1)
    roles: dict[str, list[Mapping[str, Any] | None]] = {}
    for cell in inside:
        roles.setdefault(cell["role"], [None] * layers)[cell["layer"]] = cell
    return {
        "layers": layers,
        "roles": roles,
        "room": "few" if layers <= FEW else "some" if layers <= SOME else "many",
        "step": next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, 1 << 62) if layers <= 20 * step),
    }
