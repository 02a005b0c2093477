"""The replication keys as they lie in files: their exact GGUF types, and the hash that binds them to the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rondel.converters.errors import RondelError
from rondel.converters.gguf_keys import Rondel
from rondel.converters.gguf_writer import Value
from rondel.converters.manifest import digest_of

STRICT = Rondel.REPLICATION + "strict"
_DTYPES: dict[str, type[np.integer]] = {
    "version": np.uint32,
    "n_base": np.uint32,
    "step.layer": np.uint32,
    "step.pass": np.uint8,
    "step.parts": np.uint8,
    "step.group": np.uint32,
    "step.kv": np.int32,
    "step.pset": np.uint32,
    "group.merge": np.uint8,
    "layer.pset": np.uint32,
    "pset.first": np.uint32,
    "ent.kind": np.uint8,
    "ent.enc": np.uint8,
    "ent.off": np.uint32,
    "ent.len": np.uint32,
    "expert.list": np.uint32,
}


def _typed(key: str, value: Any, dtype: type[np.integer]) -> Value:
    """An integer or a list of integers as the numpy type of its key."""
    try:
        numbers = np.array(value).astype(np.int64)
    except (OverflowError, TypeError, ValueError) as error:
        raise RondelError(f"the manifest's replication record has no numbers in {key}") from error
    limits = np.iinfo(dtype)
    if numbers.ndim > 1 or (numbers.size and not limits.min <= numbers.min() <= numbers.max() <= limits.max):
        raise RondelError(f"the manifest's replication record has numbers out of range in {key}")
    return numbers.astype(dtype)[()]


def replication_keys(record: Mapping[str, Any]) -> dict[str, Value]:
    """The manifest's replication record with every number and array in its own type."""
    keys: dict[str, Value] = {}
    for key, value in record.items():
        name = key.removeprefix(Rondel.REPLICATION)
        if name in _DTYPES:
            keys[Rondel.REPLICATION + name] = _typed(key, value, _DTYPES[name])
        elif isinstance(value, str | bool | int | float):
            keys[Rondel.REPLICATION + name] = value
        else:
            raise RondelError(f"the manifest's replication record has an unknown array {key}; update rondel")
    return keys


def is_strict(keys: Mapping[str, Value]) -> bool:
    """Whether the base path alone is not acceptable."""
    return bool(keys.get(STRICT, False))


def base_sha256(hashes: Mapping[str, str], layers: Iterable[int]) -> str:
    """The hash of all tensors of the replicated layers, from the hash of each: what `base.sha256` holds."""
    prefixes = tuple(f"blk.{layer}." for layer in layers)
    return digest_of({name: sha256 for name, sha256 in hashes.items() if name.startswith(prefixes)})


def replicated_layers(record: Mapping[str, Any]) -> list[int]:
    """The layers that run more than once, from the keys of a file or of a manifest; empty where they tell of none."""
    layers, passes = (_integers(record.get(Rondel.REPLICATION + name)) for name in ("step.layer", "step.pass"))
    return sorted({layer for layer, number in zip(layers, passes, strict=False) if number > 0})


def _integers(value: Any) -> list[int]:
    numbers = value.tolist() if isinstance(value, np.ndarray) else value
    return [number for number in numbers if type(number) is int] if isinstance(numbers, list) else []
