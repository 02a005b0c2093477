"""The weight files of a Hugging Face folder: where each tensor is, read lazily and without running code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rondel.converters.errors import RondelError
from rondel.converters.folder import FLOAT_FORMATS, read_tensor

# In the order in which transformers looks for them.
LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SAFETENSORS_FORMATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


class Weights:
    """The tensors of a folder by their names there. `shapes` and `formats` are known without reading a weight."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.formats: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self._pickled: dict[str, dict[str, torch.Tensor]] = {}
        layout = next((name for name in LAYOUTS if (root / name).is_file()), None)
        if layout is None:
            raise RondelError(f"{root}: holds no weights; expected {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}")
        index = _weight_map(root / layout) if layout.endswith(".json") else None
        for file in [layout] if index is None else sorted(set(index.values())):
            self._list_file(file)
        for name, file in (index or {}).items():
            if self.files.get(name) != file:
                raise RondelError(f"{root / file}: tensor {name} is missing, though {layout} says it is there")

    def _list_file(self, file: str) -> None:
        path = self.root / file
        if not path.is_file():
            raise RondelError(f"{path}: this shard of the weights is missing; download the model again")
        for name, shape, form in _list_bin(self._load(file)) if file.endswith(".bin") else _list_safetensors(path):
            if name in self.files:
                raise RondelError(f"{path}: tensor {name} is also in {self.files[name]}")
            self.files[name], self.shapes[name], self.formats[name] = file, shape, form

    def _load(self, file: str) -> dict[str, torch.Tensor]:
        """The tensors of a pickled file, mapped and not read."""
        if file not in self._pickled:
            self._pickled[file] = _load_bin(self.root / file)
        return self._pickled[file]

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it is stored."""
        file = self.files[name]
        return self._load(file)[name] if file.endswith(".bin") else read_tensor(self.root / file, name)


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name to file name; a file outside the folder is refused."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(found, dict) or not found:
            raise TypeError("weight_map is not an object of tensor names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RondelError(f"{path}: is not an index of weight files ({error!r})") from error
    for name, file in found.items():
        plain = isinstance(file, str) and PurePosixPath(file).name == file and "\\" not in file
        if not plain or not file.endswith((".safetensors", ".bin")):
            raise RondelError(f"{path}: tensor {name} is said to be in {file!r}, expected a file of this folder")
    return found


def _list_safetensors(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a dictionary)
            return [
                (name, tuple(part.get_shape()), SAFETENSORS_FORMATS.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            ]
    except (OSError, SafetensorError) as error:
        raise RondelError(f"{path}: is not a whole safetensors file ({error}); download it again") from error


def _list_bin(tensors: dict[str, torch.Tensor]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, tuple(t.shape), FLOAT_FORMATS.get(t.dtype, str(t.dtype))) for name, t in tensors.items()]


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    """A pickled state dictionary through torch's weights-only reader, which runs no code of the file."""
    load: Callable[..., Any] = torch.load
    try:
        try:
            found = load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            found = load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise RondelError(f"{path}: is not a plain dictionary of tensors ({reason}); use safetensors") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in found.items()
    ):
        raise RondelError(f"{path}: is not a plain dictionary of tensors; use safetensors")
    return found
