"""What `rondel quantize --compare` runs and shows: one line a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rondel.cli import console

COLUMNS = {
    "error": "output error",
    "mean_kl": "mean KL",
    "kl_99_9": "99.9 % KL",
    "same_top": "same top",
    "perplexity": "perplexity",
    "bytes": "bytes",
    "seconds": "seconds",
}


def measure(
    source: Any,
    config: Any,
    importance: Any,
    *,
    methods: str | None,
    out: Path | None,
    quiet: bool,
    **running: Any,
) -> dict[str, Any]:
    """The facts that --compare --json prints; `methods` by commas."""
    from rondel.quant.compare import compare

    named = None if methods is None else tuple(methods.split(","))
    with console.progress(quiet=quiet) as progress:
        return compare(source, config, importance, methods=named, out=out, progress=progress, **running)


def text(told: dict[str, Any]) -> str:
    """The table of --compare, one method a line, and the output errors by role below it."""
    rows = told["methods"]
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    table = console.table(
        ["method", *(COLUMNS[key] for key in shown)],
        [[row["method"], *("" if row[key] is None else row[key] for key in shown)] for row in rows],
    )
    parts = [table]
    if "windows" in told:
        judged = f"{told['windows']} windows of {told['context']} tokens held out of the calibration text"
        parts.append(f"judged on {judged}; unquantized perplexity {rows[0]['base_perplexity']:.6g}")
    roles = list(rows[0]["roles"])
    if roles:
        errors = [[row["method"], *(row["roles"][role] for role in roles)] for row in rows]
        parts.append("output error by role:\n" + console.table(["method", *roles], errors))
    parts += [f"left out {name}: {reason}" for name, reason in told["left_out"].items()]
    return "\n\n".join(parts)
