"""Owns how the choice whether to rotate is told: its table, what it paid for bytes, and the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rondel.cli import console


def with_choice(told: dict[str, Any], line: str, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What a stage wrote, as JSON and as text, with the choice where the stage rotate made one."""
    choice = manifest.get("rotation_choice")
    return (told | {"choice": choice}, f"{text(choice)}\n{line}") if choice else (told, line)


def text(choice: Mapping[str, Any]) -> str:
    """The choice's table and its reason."""
    if "tensors" not in choice:
        return f"rotated as asked: {choice['reason']}"
    head = ("tensors", "formats", "error as is", "scale dB", "rotate dB", "rotate and scale dB")
    table = console.table(head, [list(line.values()) for line in choice["tensors"]])
    way = choice["chosen"].replace("_", " ")
    bytes_ = f"{choice['bytes']['now']} B of matrices as is, {choice['bytes']['rotated']} B rotated"
    paid = f" ({choice['decibels_for_bytes']:+.2f} dB)" if choice["decibels_for_bytes"] else ""
    return (
        f"{table}\n{bytes_}{paid}\n{choice['type']}: {way}, because {choice['reason']}; "
        f"then quantize with --method {choice['method']}"
    )
