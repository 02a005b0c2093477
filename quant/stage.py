"""The record that a stage leaves in the manifest: its name, rondel's version, its settings and what it read."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol


class Fingerprinted(Protocol):
    """A folder that a stage reads: a Checkpoint or Stats."""

    def fingerprint(self) -> str:
        """A hash of everything read from it."""
        ...


def rondel_version() -> str:
    """The version of the installed package."""
    try:
        return version("rondel")
    except PackageNotFoundError:
        return "unknown"


def stage_record(name: str, config: Any, **inputs: Fingerprinted | str | None) -> dict[str, Any]:
    """The record of one stage; `config` is its frozen dataclass, inputs are folders or fingerprints, or None.

    Two runs with equal records write equal bytes, so neither threads nor devices nor paths belong in a config.
    """
    prints = {
        key: value if isinstance(value, str) else value.fingerprint()
        for key, value in inputs.items()
        if value is not None
    }
    return {"name": name, "version": rondel_version(), "config": asdict(config), "inputs": prints}
