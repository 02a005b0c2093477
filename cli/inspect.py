"""`rondel inspect`: what is in a GGUF file or in a folder that a stage wrote, for people and for `jq`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from rondel.cli import console
from rondel.cli.options import HoldingArgument, JsonOption

LONG = 8  # elements: longer arrays (a vocabulary) are shown by their length


def inspect(
    path: HoldingArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor too; --json always does.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a GGUF file or a rondel folder holds.

    Keys, bytes by type, bits a weight, rotations, replication and what was measured of it; of a folder, the stages that
    made it.

    Example:

    \b
      rondel inspect model.gguf
      rondel inspect model.gguf --json | jq .types
    """
    told = describe_folder(path) if path.is_dir() else describe_file(path)
    console.result(told, _text(told, tensors), as_json=as_json, quiet=False)


def describe_file(path: Path) -> dict[str, Any]:
    """The facts of a GGUF file, as JSON holds them."""
    from rondel.converters.replication_codec import told_replication
    from rondel.native import File

    with File(path) as file:
        keys = {name: _value(file.keys.type(name), file.keys[name]) for name in file.keys}
        tensors = [
            {"name": t.name, "type": t.format, "shape": list(t.shape), "bytes": t.bytes, "offset": t.offset}
            for t in file.tensors
        ]
        return {
            "path": str(path),
            "kind": "gguf",
            "version": file.version,
            "alignment": file.alignment,
            "parts": len(file.shards),
            "keys": keys,
            "rotations": _rotations(keys),
            **told_replication({name: file.keys[name] for name in file.keys}),
            **_totals(tensors),
            "tensors": tensors,
        }


def describe_folder(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint's or statistics' folder."""
    from rondel.converters.manifest import read_manifest, shard_spans, tensor_infos
    from rondel.converters.replication_codec import told_replication

    manifest = read_manifest(path)
    infos = tensor_infos(manifest)
    spans = {shard: shard_spans(path / shard) for shard in dict.fromkeys(info.shard for info in infos.values())}
    tensors = []
    for info in infos.values():
        first, last = spans[info.shard].get(info.name, (0, 0))
        tensors.append({"name": info.name, "type": info.format, "shape": list(info.shape), "bytes": last - first})
    carried = {key: value for key, value in manifest.items() if key not in ("tensors", "manifest_version")}
    if carried.get("replication"):
        carried |= told_replication(carried["replication"])
    return {"path": str(path), **carried, **_totals(tensors), "tensors": tensors}


def _value(kind: str, value: Any) -> Any:
    """A key's value for JSON; a long array is told by its length."""
    if not kind.startswith("array"):
        return value
    if len(value) > LONG:
        return f"{len(value)} values, {kind}"
    return value if isinstance(value, list) else value.tolist()


def _rotations(keys: dict[str, Any]) -> list[dict[str, Any]]:
    """The rotation records that the keys hold, each as {"site", "kind", "online", ...}."""
    from rondel.converters.gguf_keys import Rondel

    records = []
    for index in range(keys.get(Rondel.ROTATION_COUNT, 0)):
        start = Rondel.ROTATION.format(index=index, field="")
        records.append({key.removeprefix(start): value for key, value in keys.items() if key.startswith(start)})
    return records


def _totals(tensors: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes, weights and bits a weight, whole and by type."""
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        row = types.setdefault(tensor["type"], {"tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += math.prod(tensor["shape"])
        row["bytes"] += tensor["bytes"]
    weights, stored = (sum(row[part] for row in types.values()) for part in ("weights", "bytes"))
    return {
        "types": types,
        "weights": weights,
        "bytes": stored,
        "bits_per_weight": 8 * stored / weights if weights else 0,
    }


def _text(told: dict[str, Any], tensors: bool) -> str:
    left_out = ["types", "tensors", "stages", "quantization", *(["evaluation"] if not told.get("evaluation") else [])]
    parts = [console.lines({key: told[key] for key in told if key not in left_out})]
    rows = [
        (name, row["tensors"], row["weights"], row["bytes"], f"{8 * row['bytes'] / max(row['weights'], 1):.3f}")
        for name, row in told["types"].items()
    ]
    parts.append(console.table(("type", "tensors", "weights", "bytes", "bits a weight"), rows))
    if told.get("stages"):
        stages = [(s["name"], s["version"], json.dumps(s["config"], ensure_ascii=False)) for s in told["stages"]]
        parts.append(console.table(("stage", "rondel", "settings"), stages))
    if tensors:
        parts.append(console.lines({"tensors": told["tensors"]}).lstrip())
    return "\n\n".join(parts)
