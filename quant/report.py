"""What `quantize` did to every tensor, from the manifest it wrote: the data behind the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rondel.converters.manifest import TensorInfo, tensor_infos

PLAIN_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4}


def report_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a quantized folder's manifest: totals, bytes by format, the settings, and every tensor.

    A tensor's `layer` is None outside the layers, `role` is its name inside one ("ffn_down"). All that quantize told of
    a matrix is kept beside it: `error` is the relative squared error of its weights, weighted where `weighted` says so.
    `output_error` is that of its outputs: on text held out where both ways were tried there, else `error`, which is the
    same for inputs without correlation. Error feedback lowers the first by raising the second.
    """
    told = manifest["quantization"]
    tensors = [_tensor(info, told["tensors"].get(name, {})) for name, info in tensor_infos(dict(manifest)).items()]
    weights, size = sum(tensor["weights"] for tensor in tensors), sum(tensor["bytes"] for tensor in tensors)
    stages = manifest["stages"]
    record = next(stage for stage in reversed(stages) if stage["name"] == "quantize")
    return {
        "model": manifest.get("source", {}).get("name", ""),
        "family": manifest["family"],
        "version": record["version"],
        "stages": [stage["name"] for stage in stages],
        "config": record["config"],
        "calibration_tokens": manifest.get("calibration", {}).get("tokens"),
        "weights": weights,
        "bytes": size,
        "bits_per_weight": 8 * size / weights,
        "formats": _formats(tensors),
        "warnings": [*told["warnings"], *fallbacks(told["tensors"].values())],
        **{key: value for key, value in told.items() if key not in ("tensors", "warnings")},
        "tensors": tensors,
    }


def _tensor(info: TensorInfo, told: Mapping[str, Any]) -> dict[str, Any]:
    layer, role = _place(info.name)
    weights = math.prod(info.shape)
    size = told["bytes"] if "bytes" in told else weights * PLAIN_BYTES[info.format]
    held_out = told.get("held_out_error", {}).get(told.get("method"))
    errors = {} if "error" not in told else {"output_error": told["error"] if held_out is None else held_out}
    return {
        "name": info.name,
        "layer": layer,
        "role": role,
        "shape": list(info.shape),
        "format": info.format,
        "weights": weights,
        "bytes": size,
        "bits_per_weight": 8 * size / weights,
        **{key: value for key, value in told.items() if key not in ("name", "shape", "format", "bytes")},
        **errors,
    }


def _place(name: str) -> tuple[int | None, str]:
    """The layer, and what the tensor is called in it without ".weight"."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) > 2 and parts[1].isdecimal():
        return int(parts[1]), ".".join(parts[2:]).removesuffix(".weight")
    return None, name.removesuffix(".weight")


def _formats(tensors: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bytes, weights and tensors of each format, the most bytes first."""
    totals: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        format = tensor["format"]
        total = totals.setdefault(format, {"format": format, "tensors": 0, "weights": 0, "bytes": 0})
        total["tensors"] += 1
        total["weights"] += tensor["weights"]
        total["bytes"] += tensor["bytes"]
    return sorted(totals.values(), key=lambda total: (-total["bytes"], total["format"]))


def asked_for(config: Mapping[str, Any]) -> str:
    """What the settings wanted, in a few words: "Q2_K", "the bytes of IQ2_M"."""
    if config.get("like"):
        return f"the bytes of {config['like']}"
    if config.get("bpw"):
        return f"{config['bpw']:g} bits a weight"
    return "a given size" if config.get("size") else str(config["type"])


def fallbacks(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each format that stands in for another one: the first matrix, and how many more there are."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "instead_of" in row:
            groups.setdefault((row["instead_of"], row["format"], row["shape"][1]), []).append(row)
    return [
        f"{found[0]['name']}{f' and {len(found) - 1} more' if len(found) > 1 else ''}: "
        f"{got} instead of {wanted}; rows have {cols} columns"
        for (wanted, got, cols), found in groups.items()
    ]
