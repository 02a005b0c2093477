"""Stats: what calibrate saw at every site, as a folder of safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import Site
from rondel.converters.folder import MANIFEST, TensorFolder, read_manifest

OUTPUT_IN: Site = "output_in"  # the head's input: the one site outside the blocks
MOVED = "stats"  # where rotate puts the statistics that it moved, inside the rotated checkpoint
TEXT = "text"  # the shard of the token windows
WINDOWS = "windows"  # int32 (windows, context)


def site_tensor(layer: int | None, site: str, what: str) -> str:
    """The name of one statistic: what is "second_moment", "diagonal", "absmax" or "count"; layer None for output_in."""
    return f"{site}.{what}" if layer is None else f"blk.{layer}.{site}.{what}"


class Stats(TensorFolder):
    """The statistics of one model over one text. Layer None asks for the head's input, `output_in`."""

    def _site(self, layer: int | None, site: str, what: str) -> torch.Tensor:
        name = site_tensor(layer, site, what)
        if name not in self:
            raise RondelError(f"{self.root}: holds no {what} of {site} in layer {layer}; calibrate this model again")
        return self.read(name)

    def has(self, layer: int | None, site: str, what: str = "diagonal") -> bool:
        """Whether that statistic was collected."""
        return site_tensor(layer, site, what) in self

    def diagonal(self, layer: int | None, site: str) -> torch.Tensor:
        """Mean of x^2 per channel, (d,) F32."""
        return self._site(layer, site, "diagonal")

    def second_moment(self, layer: int | None, site: str) -> torch.Tensor | None:
        """Mean of x x^T, (d, d) F32, or None where only the diagonal was collected."""
        return self._site(layer, site, "second_moment") if self.has(layer, site, "second_moment") else None

    def absmax(self, layer: int | None, site: str) -> torch.Tensor:
        """The largest |x| per channel, (d,) F32."""
        return self._site(layer, site, "absmax")

    def count(self, layer: int | None, site: str) -> int:
        """The number of tokens behind a site's means."""
        return int(self._site(layer, site, "count").item())

    def windows(self) -> torch.Tensor | None:
        """Token ids (windows, context) int64 of the text behind the statistics; None for statistics without them."""
        if WINDOWS not in self:
            return None
        windows = self.read(WINDOWS)
        vocabulary = self.manifest.get("hyperparameters", {}).get("vocabulary", 0)
        whole = windows.dtype == torch.int32 and windows.dim() == 2 and windows.numel() > 0
        if not whole or not bool(((windows >= 0) & (windows < vocabulary)).all()):
            raise RondelError(
                f"{self.root}: {WINDOWS} is {windows.dtype} {list(windows.shape)}, expected int32 windows of tokens "
                f"below {vocabulary}; the folder is damaged, calibrate this model again"
            )
        return windows.to(torch.int64)

    @property
    def rotations(self) -> list[dict[str, Any]]:
        """The rotations that the calibrated model had already gone through; statistics hold in that basis alone."""
        return self.manifest.get("rotations", [])

    @property
    def source(self) -> dict[str, Any]:
        """{"name", "sha256"} of the Hugging Face model behind the calibrated one."""
        return self.manifest.get("source", {})

    @property
    def calibration(self) -> dict[str, Any]:
        """{"sha256", "tokens"} of the text."""
        return self.manifest.get("calibration", {})

    def check_basis(self, source: Checkpoint) -> None:
        """Refuse statistics of another model, or of another basis than the one `source` stands in."""
        mine, theirs = self.manifest, source.carried()
        same_model = mine.get("family") == theirs["family"] and self.source == theirs["source"]
        if not same_model:
            raise RondelError(f"{self.root}: statistics of another model than {source.root}; calibrate that one")
        if self.rotations != theirs.get("rotations", []):
            raise RondelError(
                f"{self.root}: statistics from another basis than {source.root} stands in; use the ones that "
                "rotate --stats left in the rotated folder, or calibrate the rotated model"
            )


def open_stats(path: Path) -> Stats:
    """Open the folder that calibrate wrote, or the statistics that rotate left inside a rotated checkpoint."""
    if (path / MOVED / MANIFEST).is_file():
        path = path / MOVED
    if not (path / MANIFEST).is_file():
        raise RondelError(f"{path}: holds no statistics; expected a folder that rondel calibrate wrote")
    manifest = read_manifest(path)
    if manifest.get("kind") != "stats":
        raise RondelError(f"{path}: holds {manifest.get('kind')!r}, the statistics of rondel calibrate are needed here")
    return Stats(path, manifest)


def stats_for(source: Checkpoint, path: Path | None) -> Stats | None:
    """The statistics at `path` in the basis of `source`: where rotate moved them into its folder, the moved ones.

    Without a path those inside `source`, or None.
    """
    inside = source.root / MOVED
    if not (inside / MANIFEST).is_file():
        return open_stats(path) if path else None
    moved = open_stats(inside)
    if path is None:
        return moved
    given = open_stats(path)
    moved_from = moved.manifest["stages"][-1].get("inputs", {}).get("stats")
    return moved if moved_from == given.fingerprint() else given
