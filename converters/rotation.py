"""A rotation is data: the same record is applied, saved in the manifest, written to GGUF keys and executed online."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Rotation:
    """x <- H (s o x) / sqrt(block) on each block of the channels of a site (formats.md, section 3).

    `signs` holds one bit a channel, least significant first (1 = minus), as hexadecimal text.
    """

    site: str  # "residual", "heads", "hidden", ...
    kind: str  # "hadamard" or "orthogonal"
    online: bool
    size: int  # channels of the site
    block: int  # block-diagonal where block < size
    signs: str
    layers: tuple[int, ...] | None = None  # None: all

    def to_json(self) -> dict[str, Any]:
        """The record of the manifest."""
        return asdict(self)

    @staticmethod
    def from_json(record: dict[str, Any]) -> Rotation:
        """The record back from a manifest."""
        layers = record.get("layers")
        return Rotation(**{**record, "layers": None if layers is None else tuple(layers)})
