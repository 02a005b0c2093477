"""One tensor of an exported file: its name, its format, its exact size, and its bytes when its turn comes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.folder import TensorInfo
from rondel.converters.ggml_types import GGML_TYPES
from rondel.converters.gguf_writer import MAX_NAME_BYTES, Entry
from rondel.converters.row_gains import fold_into_blocks

FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXTENDED = re.compile(r"([UT])([1248]|3)(?:-(64|128|256))?")
_FEATURES = {"U": "tile-1", "T": "trellis-1"}
_PANEL_ROWS = {"U": 16, "T": 8}
_TRELLIS_GROUP = 256
_SCALE_BYTES = 2


@dataclass(frozen=True)
class Outgoing:
    """A tensor as it will stand in the file. `shape` is (rows, columns) or (elements,)."""

    name: str
    source: str  # its name in the checkpoint
    shape: tuple[int, ...]
    format: str
    gain: np.ndarray | None = None  # float64: multiplies each row, or each element of a 1-D tensor

    @property
    def feature(self) -> str | None:
        """The feature that a reader needs for an extended format."""
        match = _EXTENDED.fullmatch(self.format)
        return _FEATURES[match[1]] if match else None


def _extended_bytes(format: str, rows: int, columns: int) -> int:
    """Tiles or runs of whole panels, and one float16 scale a row and group (formats.md, section 2)."""
    match = _EXTENDED.fullmatch(format)
    assert match is not None
    panel = _PANEL_ROWS[match[1]]
    group = int(match[3] or _TRELLIS_GROUP)
    if columns % group:
        raise RondelError(f"{format}: rows of {columns} weights are not a multiple of the group of {group}")
    padded_rows = -(-rows // panel) * panel
    return padded_rows * (columns * int(match[2]) // 8 + columns // group * _SCALE_BYTES)


def entry(tensor: Outgoing) -> Entry:
    """What the file's list of tensors says: extended formats stand there as bytes of one dimension."""
    if len(tensor.name.encode()) > MAX_NAME_BYTES:
        raise RondelError(f"{tensor.name}: a GGUF tensor name has at most {MAX_NAME_BYTES} bytes")
    if tensor.feature is not None:
        size = _extended_bytes(tensor.format, *tensor.shape)
        return Entry(tensor.name, (size,), GGML_TYPES["I8"].number, size)
    kind = GGML_TYPES.get(tensor.format)
    if kind is None:
        raise RondelError(f"{tensor.name}: {tensor.format} is not a format of GGUF files; quantize again")
    columns = tensor.shape[-1]
    if columns % kind.block:
        raise RondelError(
            f"{tensor.name}: rows of {columns} weights do not fit blocks of {kind.block} ({tensor.format})"
        )
    count = int(np.prod(tensor.shape, dtype=np.int64))
    return Entry(tensor.name, tuple(reversed(tensor.shape)), kind.number, count // kind.block * kind.bytes)


def _outgoing_format(info: TensorInfo, wanted: str | None) -> str:
    """Biases, norms and everything of one dimension stay F32, as llama.cpp's kernels expect."""
    if info.packed:
        return info.format
    if len(info.shape) <= 1 or info.name.endswith("_norm.weight") or not info.name.endswith(".weight"):
        return "F32"
    return wanted or info.format


def outgoing_tensors(source: Checkpoint, wanted: str | None) -> list[Outgoing]:
    """The checkpoint's tensors in its order; `wanted` is the type of the matrices, None keeps what is stored."""
    infos = [source.info(name) for name in source.names()]
    return [Outgoing(info.name, info.name, info.shape, _outgoing_format(info, wanted)) for info in infos]


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _float_bytes(source: Checkpoint, tensor: Outgoing) -> np.ndarray:
    values = source.read(tensor.source)
    if tensor.gain is not None:
        gain = torch.from_numpy(tensor.gain)
        values = values.to(torch.float64) * (gain if values.dim() == 1 else gain[:, None])
    cast = values.to(FLOAT_TYPES[tensor.format])
    if tensor.format != "BF16" and values.dtype != cast.dtype:
        lost = torch.isinf(cast) & torch.isfinite(values)
        if bool(lost.any()):
            largest = float(values[lost].abs().max())
            raise RondelError(
                f"{tensor.source}: the value {largest:g} is beyond the range of {tensor.format}; "
                "export with --type BF16 or F32"
            )
    return _bytes(cast)


def tensor_bytes(source: Checkpoint, tensor: Outgoing) -> np.ndarray:
    """The bytes of a tensor in the file, uint8; read, changed and dropped one tensor at a time."""
    if not source.info(tensor.source).packed:
        return _float_bytes(source, tensor)
    data = _bytes(source.packed(tensor.source).data)
    expected = entry(tensor).bytes
    if data.size != expected:
        raise RondelError(
            f"{source.root}: {tensor.source} has {data.size} bytes, {tensor.format} of shape {list(tensor.shape)} "
            f"takes {expected}; quantize again"
        )
    if tensor.gain is None:
        return data
    return fold_into_blocks(data, tensor.format, tensor.gain, tensor.source)
