"""Owns how one tensor turns: which rotation acts on its rows, which on its columns, and the gain folded in between."""

from __future__ import annotations

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import EMBEDDING, OUTPUT
from rondel.converters.rotation import Rotation
from rondel.quant.fold import folded_norms, gain_of_reader
from rondel.quant.hadamard import pack_signs, rotate_channels, unpack_signs
from rondel.quant.workers import Workers

CHUNK = 256  # rows or columns that one worker turns at a time; a constant, so that results do not depend on threads


def _value_rotation(source: Checkpoint, heads: Rotation) -> Rotation:
    """The rotation of the value channels that the rotation of the heads implies: one query head of each group."""
    numbers = source.numbers
    signs = unpack_signs(heads.signs, heads.size).reshape(numbers.kv_heads, -1, numbers.head_dim)[:, 0].flatten()
    return Rotation("values", heads.kind, False, len(signs), heads.block, pack_signs(signs))


class Rotator:
    """Turns one tensor after another, in float64 inside and `dtype` outside, chunks spread over the workers."""

    def __init__(
        self,
        source: Checkpoint,
        rotations: list[Rotation],
        workers: Workers,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source = source
        self.workers = workers
        self.device = device
        self.dtype = dtype
        by_site = {rotation.site: rotation for rotation in rotations}
        self.residual, self.heads = by_site.get("residual"), by_site.get("heads")
        # What turns the vectors at a site, for the matrices that read it, and for those that write it.
        self.reading = dict(by_site)
        self.writing = {"residual": self.residual} if self.residual else {}
        if self.heads:
            self.writing["values"] = _value_rotation(source, self.heads)
        self.folded = set(folded_norms(source)) if self.residual else set()

    def tensor(self, name: str) -> torch.Tensor:
        """The rotated tensor of that name."""
        if name in self.folded:
            return torch.ones(self.source.info(name).shape, dtype=self.dtype)
        if name in (EMBEDDING, OUTPUT):
            stored = name if name in self.source else self.source.head()
            return self._turn(self.source.read(stored), columns=self.residual, gain=self._gain(name))
        role = name.split(".")[2] if name.startswith("blk.") else None
        linear = next((linear for linear in self.source.family.linears if linear.role == role), None)
        if linear is None:
            return self.source.read_float(name, self.dtype)
        writing = self.writing.get(linear.writes)
        if name.endswith(".bias"):
            bias = self.source.read_float(name, torch.float64)
            return (rotate_channels(bias, writing) if writing else bias).to(self.dtype)
        gain = self._gain(name)
        columns = self.reading.get(linear.reads) if gain is None else self.residual
        return self._turn(self.source.read(name), rows=writing, columns=columns, gain=gain)

    def _gain(self, name: str) -> torch.Tensor | None:
        norm = gain_of_reader(self.source, name) if self.residual else None
        return self.source.read_float(norm, torch.float64).to(self.device) if norm else None

    def _turn(
        self,
        weight: torch.Tensor,
        *,
        rows: Rotation | None = None,
        columns: Rotation | None = None,
        gain: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weight (rows, cols) after turning its rows' channels, then its columns' ones with a gain before."""
        out = torch.empty(weight.shape, dtype=self.dtype)
        turned = torch.empty(weight.shape, dtype=torch.float64) if rows else weight

        def turn_rows(first: int) -> None:
            part = weight[:, first : first + CHUNK].to(self.device, torch.float64)
            assert rows is not None
            turned[:, first : first + CHUNK] = rotate_channels(part.T, rows).T.cpu()

        def turn_columns(first: int) -> None:
            part = turned[first : first + CHUNK].to(self.device, torch.float64)
            part = part if gain is None else part * gain
            part = part if columns is None else rotate_channels(part, columns)
            out[first : first + CHUNK] = part.to(self.dtype).cpu()

        if rows:
            self.workers.run(turn_rows, range(0, weight.shape[1], CHUNK))
        self.workers.run(turn_columns, range(0, weight.shape[0], CHUNK))
        return out
