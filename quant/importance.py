"""How much the error of each input channel counts: mean squares from calibrate's statistics or from an imatrix file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import OUTPUT
from rondel.converters.imatrix import read_imatrix
from rondel.converters.rotation import basis_hash
from rondel.converters.stats import OUTPUT_IN, Stats

Means = NDArray[np.float32]


@dataclass(frozen=True)
class Importance:
    """E[x^2] of the inputs of each matrix, read when asked for: from `stats`, or else from `matrices`."""

    stats: Stats | None = None
    matrices: Mapping[str, Means] = field(default_factory=dict)  # of an imatrix file, by canonical tensor name
    name: str = "the statistics"  # for messages
    calibration: Mapping[str, Any] = field(default_factory=dict)
    basis: str | None = None  # of an imatrix file: hash of the rotations that its model had gone through

    def of(self, source: Checkpoint, name: str) -> Means | None:
        """Mean squares (cols,) of what the matrix `name` reads, or None where nothing was measured.

        The embedding is looked up, not multiplied, so no channel of it counts more than another.
        """
        if self.stats is None:
            return self.matrices.get(name)
        layer, site = site_of(source, name)
        if site is None or not self.stats.has(layer, site):
            return None
        return self.stats.diagonal(layer, site).numpy()

    def fingerprint(self) -> str:
        """A hash of all means."""
        if self.stats is not None:
            return self.stats.fingerprint()
        digest = hashlib.sha256()
        for name in sorted(self.matrices):
            digest.update(name.encode() + b"\0" + np.ascontiguousarray(self.matrices[name], "<f4").tobytes())
        return digest.hexdigest()


def open_imatrix(path: Path) -> Importance:
    """The means of an imatrix file, of llama.cpp or of calibrate."""
    found = read_imatrix(path)
    return Importance(matrices=found.values, name=str(path), basis=found.basis)


def importance_of(stats: Stats) -> Importance:
    """The means that calibrate measured."""
    return Importance(stats=stats, name=str(stats.root), calibration=stats.calibration)


def site_of(source: Checkpoint, name: str) -> tuple[int | None, str | None]:
    """Layer and site of what a matrix reads; (None, None) for the embedding, which is looked up."""
    if name == OUTPUT:
        return None, OUTPUT_IN
    if not name.startswith("blk."):
        return None, None
    _, layer, role, _ = name.split(".", 3)
    return int(layer), source.family.linear(role).reads


def check_importance(importance: Importance, source: Checkpoint, names: list[str]) -> None:
    """Refuse means that were measured in another basis or for matrices of other widths."""
    rotations = source.manifest.get("rotations", [])
    if importance.stats is not None and importance.stats.rotations != rotations:
        raise RondelError(
            f"{importance.name}: was measured in another basis than {source.root} is in "
            f"({len(importance.stats.rotations)} rotations against {len(rotations)}); "
            "use the statistics that rotate wrote, or calibrate the rotated model"
        )
    if importance.stats is None and importance.basis != basis_hash(rotations):
        measured = "behind other rotations than" if importance.basis else "on a model that is not rotated, unlike"
        measured = measured if rotations else "on a rotated model, unlike"
        raise RondelError(
            f"{importance.name}: was measured {measured} {source.root}; run rondel calibrate on this very model, "
            "or use the statistics that rotate wrote"
        )
    for name in names:
        means = importance.of(source, name)
        cols = source.info(name).shape[1]
        if means is not None and means.shape != (cols,):
            raise RondelError(
                f"{importance.name}: has {list(means.shape)} channels for {name}, whose rows have {cols}; "
                "it is of another model"
            )
