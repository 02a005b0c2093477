"""Owns the comparison of methods: the same model and bytes, rounded by each, in one table.

Every method writes a whole model, as it would alone, and what is measured is what was written: the relative error of
each matrix's outputs over the calibration statistics, in the float model's own coordinates, and where the statistics
hold their text, the divergence of the model's predictions on the windows held out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.folder import MANIFEST
from rondel.converters.progress import Progress, silent
from rondel.converters.stats import Stats
from rondel.quant import rescaling
from rondel.quant.decoded_view import DecodedView
from rondel.quant.divergence import Judge
from rondel.quant.importance import Importance, importance_of
from rondel.quant.methods import ROUNDINGS, Method, method_named
from rondel.quant.mixtures import is_matrix
from rondel.quant.output_error import digits, moment_of, output_error
from rondel.quant.quantize import QuantizeConfig, plan, quantize
from rondel.quant.rescaled_view import RescaledView
from rondel.quant.sequential import split_windows
from rondel.quant.workers import Workers, check_device

WINDOWS_JUDGED = 32  # at most
PREDICTIONS = ("mean_kl", "kl_99_9", "same_top", "perplexity")


@dataclass(frozen=True)
class Comparison:
    """What all methods share."""

    source: Checkpoint
    config: QuantizeConfig
    importance: Importance | None
    threads: int | None = None
    device: str = "cpu"
    force: bool = False


def every_method() -> list[str]:
    """The methods that a comparison takes when none are named."""
    rescaled = [Method(rounding, "awq").name for rounding in ROUNDINGS if rounding != "rtn"]
    return [*ROUNDINGS, *rescaled, Method("imatrix", "smoothquant").name]


def possible(comparison: Comparison, names: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The methods to compare, and why others are left out. One that was named and cannot be is refused."""
    if names is not None:
        methods = list(dict.fromkeys(method_named(name).name for name in names))
        for name in methods:
            plan(comparison.source, replace(comparison.config, method=name), comparison.importance)
        return methods, {}
    methods, left_out = [], {}
    for name in every_method():
        try:
            plan(comparison.source, replace(comparison.config, method=name), comparison.importance)
        except RondelError as error:
            left_out[name] = str(error)
        else:
            methods.append(name)
    if not methods:
        raise RondelError(next(iter(left_out.values())))
    return methods, left_out


def matrix_errors(comparison: Comparison, made: Checkpoint, method: Method, workers: Workers) -> dict[str, float]:
    """The relative output error of every matrix that the statistics know, by name."""
    source, importance = comparison.source, comparison.importance
    if importance is None:
        return {}
    decoded: Checkpoint = DecodedView(made)
    groups = made.manifest["quantization"].get("rescaling")
    if groups:
        chosen = made.manifest["quantization"].get("auto")
        method = method_named(chosen["chosen"]) if chosen else method
        scales = rescaling.of_groups(source, method, importance, groups)
        decoded = RescaledView(decoded, {place: 1 / scale for place, scale in scales.items()})
    errors = {}
    for name in source.names():
        moment = moment_of(importance, source, name) if is_matrix(name, source.info(name).shape) else None
        if moment is not None:
            errors[name] = output_error(source.read_float(name), decoded.read_float(name), moment, workers)
    return errors


def by_role(errors: dict[str, float]) -> dict[str, float]:
    """The mean error of the matrices of each role, "attn_q" or "output"."""
    roles: dict[str, list[float]] = {}
    for name, error in errors.items():
        roles.setdefault(name.split(".")[-2], []).append(error)
    return {role: digits(sum(found) / len(found)) for role, found in roles.items()}


def _row(
    comparison: Comparison, name: str, folder: Path, *, judge: Judge | None, workers: Workers, progress: Progress
) -> dict[str, Any]:
    """One line of the table."""
    fresh, started = not (folder / MANIFEST).is_file(), time.perf_counter()
    made = quantize(
        comparison.source,
        folder,
        replace(comparison.config, method=name),
        comparison.importance,
        threads=comparison.threads,
        device=comparison.device,
        force=comparison.force,
        progress=lambda done, total, what: progress(done, total, f"{name} {what}"),
    )
    seconds = time.perf_counter() - started
    errors = matrix_errors(comparison, made, method_named(name), workers)
    row: dict[str, Any] = {
        "method": name,
        "error": digits(sum(errors.values()) / len(errors)) if errors else None,
        "roles": by_role(errors),
        "bytes": sum(told["bytes"] for told in made.manifest["quantization"]["tensors"].values()),
        "seconds": round(seconds, 1) if fresh else None,
    }
    if judge:
        told = judge.measure(DecodedView(made))
        row |= {key: digits(told[key]) for key in PREDICTIONS} | {"base_perplexity": digits(told["base_perplexity"])}
    return row


def held_out(stats: Stats | None) -> Any:
    """The windows to judge by, (n, context), or None where the statistics hold no text."""
    windows = stats.windows() if stats else None
    if windows is None:
        return None
    return windows[split_windows(len(windows))[1]][:WINDOWS_JUDGED]  # gptq learns nothing from those


def compare(
    source: Checkpoint,
    config: QuantizeConfig,
    stats: Stats | Importance | None,
    *,
    methods: Sequence[str] | None = None,
    out: Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Quantize `source` by each of `methods` (None: all that the statistics allow) and measure what comes out.

    `out` keeps every method's model in a folder of its name; otherwise they are removed. Returns "methods", a row
    each: error, roles, bytes of the matrices, seconds, and mean_kl, kl_99_9 (nats a token), same_top, perplexity.
    """
    check_device(device)
    importance = importance_of(stats) if isinstance(stats, Stats) else stats
    comparison = Comparison(source, config, importance, threads, device, force)
    chosen, left_out = possible(comparison, methods)
    windows = held_out(importance.stats if importance else None)
    rows = []
    with Workers(threads) as workers:
        judge = None if windows is None else Judge(source, windows, workers, device)
        for name in chosen:
            with TemporaryDirectory(prefix="rondel-compare-") as temporary:
                folder = Path(out or temporary) / name
                folder.parent.mkdir(parents=True, exist_ok=True)
                rows.append(_row(comparison, name, folder, judge=judge, workers=workers, progress=progress))
    told = {"type": config.type, "methods": rows, "left_out": left_out}
    return told | ({"windows": len(windows), "context": windows.shape[1]} if windows is not None else {})
