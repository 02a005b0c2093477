"""Reads the JSON files that lie beside a model's tensors: other people's, so every one is checked to be an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rondel.converters.errors import RondelError


def read_json(path: Path | None) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RondelError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise RondelError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
