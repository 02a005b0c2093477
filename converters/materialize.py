"""Turns serial replication into real layers, so that unmodified llama.cpp runs every step (formats.md, section 4)."""

from __future__ import annotations

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.outgoing import Outgoing


def materialize(source: Checkpoint, tensors: list[Outgoing]) -> tuple[list[Outgoing], int]:
    """The tensors of the expanded path and its number of layers."""
    if not source.manifest.get("replication"):
        return tensors, source.numbers.layers
    raise RondelError(f"{source.root}: --materialize of replicated layers is not implemented yet")
