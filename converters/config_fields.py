"""A config.json whose fields are checked when they are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rondel.converters.errors import RondelError

LARGEST_SIZE = 1 << 24  # of any dimension: more is a damaged file


class ConfigFields:
    """A config.json whose fields are checked when they are taken."""

    def __init__(self, fields: dict[str, Any], path: Path) -> None:
        self.fields = fields
        self.path = path

    def refuse(self, field: str, expected: str, got: Any) -> RondelError:
        """The error for a field that holds something else."""
        return RondelError(f"{self.path}: {field} must be {expected}, got {got!r}")

    def size(self, field: str, default: int | None = None, limit: int = LARGEST_SIZE) -> int:
        """A positive integer."""
        value = self.fields.get(field)
        if value is None:
            value = default
        if type(value) is not int or not 0 < value < limit:
            raise self.refuse(field, f"a positive integer below {limit}", value)
        return value

    def number(self, field: str, value: Any) -> float:
        """A positive number, taken by the caller."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refuse(field, "a positive number", value)
        return float(value)

    def flag(self, field: str) -> bool:
        """True or false, false where absent."""
        value = self.fields.get(field, False)
        if not isinstance(value, bool):
            raise self.refuse(field, "true or false", value)
        return value
