"""Owns how the outcome of `rondel replicate` is told: what was compared, at what cost, and the files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rondel.cli import console

HEAD = ("candidate", "bytes more", "read more", "compute more", "KL", "NLL")
NAMES = {"input": "as it was", "tuned": "tuned", "base": "base path", "copies": "copies"}


def compared(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was measured on the text that judges, as rows: the model, its tuned copy, copies and their rivals."""
    losses, costs, free = result["losses"], result.get("costs"), {"bytes": 0, "read": 0, "compute": 0.0}
    rows = [{"name": "teacher", "bytes": None, "read": None, "compute": 0.0, **losses["teacher"]}]
    rows += [
        {"name": told, **(costs if name == "copies" and costs else free), **losses[name]}
        for name, told in NAMES.items()
        if name in losses
    ]
    rivals = [*result.get("rivals", []), *([result["correction"]] if "correction" in result else [])]
    rows += [
        {"compute": 0.0, **{key: rival[key] for key in ("name", "bytes", "read", "kl", "nll")}} for rival in rivals
    ]
    return rows


def with_candidates(
    told: dict[str, Any], line: str, result: Mapping[str, Any], output: Path
) -> tuple[dict[str, Any], str]:
    """What the stage wrote, as JSON and as text, with what was compared, and the path of a correction."""
    if "losses" not in result:
        return told, line
    rows = compared(result)
    told = told | {"compared": rows}
    file = result.get("correction", {}).get("file")
    if file:
        told["correction"] = str(output / file)
        line += f"\n{output / file}  the correction, for llama.cpp's --lora"
    cells = [
        [
            row["name"],
            *("" if row[key] is None else row[key] for key in ("bytes", "read")),
            f"{row['compute']:.1%}",
            f"{row['kl']:.5f}",
            f"{row['nll']:.5f}",
        ]
        for row in rows
    ]
    return told, f"{console.table(HEAD, cells)}\n{line}"
