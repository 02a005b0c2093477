"""`rondel verify`: nothing of a file is believed until it was checked, byte by byte if need be."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rondel.cli import console
from rondel.cli.options import HoldingArgument, JsonOption, QuietOption
from rondel.converters.errors import RondelError
from rondel.converters.progress import Progress

if TYPE_CHECKING:
    from rondel.native import File, Tensor

DIGITS = (16, 64)  # of a tensor's sha256, that a file keeps
SHOWN = 5  # failures told in the error line; the number of all stands behind them


def verify(
    path: HoldingArgument,
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest", metavar="DIR", help="The folder that the GGUF file was exported from: compare its hashes too."
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check every length, scale and hash of a GGUF file or a rondel folder.

    A GGUF file is parsed whole; each tensor must lie where the one before it ends, every block's scale must be finite,
    and the bytes must have the sha256 that export recorded, and with --manifest the checkpoint's. Of a folder, every
    shard's bytes must have the sha256 of its manifest. Layers that run more than once must be those that their copies
    were made for. The exit code is 1 where anything is wrong.

    Example:

    \b
      rondel verify model.gguf --manifest quantized/
    """
    with console.progress(quiet=quiet) as progress:
        if path.is_dir():
            told, failures = verify_folder(path, progress)
        else:
            told, failures = verify_file(path, manifest, progress)
    told |= {"path": str(path), "failures": failures, "ok": not failures}
    console.result(told, _text(told), as_json=as_json, quiet=quiet or bool(failures))
    if failures:
        more = f", and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        raise RondelError(f"{path}: {len(failures)} failed: {'; '.join(failures[:SHOWN])}{more}")


def verify_file(path: Path, manifest: Path | None, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """What was checked in a GGUF file (all its parts), and a sentence for each thing that is wrong."""
    from rondel.converters.manifest import read_manifest, tensor_infos
    from rondel.native import File

    infos = tensor_infos(read_manifest(manifest)) if manifest else {}
    hashes, converted = 0, 0
    with File(path) as file:  # a wrong length anywhere raises here, and names it
        failures = _gaps(file)
        recorded = _recorded_hashes(file, failures)
        for done, tensor in enumerate(file.tensors):
            progress(done, len(file.tensors), tensor.name)
            failures += _damage(file, tensor)
            expected = {"the file's own record": recorded.get(tensor.name)}
            info = infos.pop(tensor.name, None)
            if info is not None and info.format == tensor.format:
                expected[f"{manifest}"] = info.sha256
            elif info is not None:
                converted += 1  # F32 to F16, say: other bytes, by intention
            known = {where: sha256 for where, sha256 in expected.items() if sha256 is not None}
            if known:
                found = hashlib.sha256(file.data(tensor).data).hexdigest()
                hashes += len(known)
                failures += [
                    f"{tensor.name}: its bytes differ from {where}"
                    for where in known
                    if not found.startswith(known[where])
                ]
        progress(len(file.tensors), len(file.tensors), "verified")
        failures += [f"{name}: is in {manifest} and not in the file" for name in infos]
        failures += _base_of_file(file, recorded)
        told = {"tensors": len(file.tensors), "bytes": sum(t.bytes for t in file.tensors), "parts": len(file.shards)}
    return told | {"hashes_compared": hashes, "converted_by_export": converted}, failures


def _damage(file: File, tensor: Tensor) -> list[str]:
    found = file.damage(tensor)
    return [found] if found else []


def _recorded_hashes(file: File, failures: list[str]) -> dict[str, str]:
    """The hashes that export wrote into each part, by tensor; none for files of other programs."""
    from rondel.converters.gguf_keys import Rondel
    from rondel.converters.gguf_reader import GgufFile

    hashes: dict[str, str] = {}
    for number, shard in enumerate(file.shards):
        joined = GgufFile(Path(shard)).keys.get(Rondel.TENSOR_SHA256)
        names = [tensor.name for tensor in file.tensors if tensor.shard == number]
        if isinstance(joined, str) and names and len(joined) in [digits * len(names) for digits in DIGITS]:
            digits = len(joined) // len(names)
            hashes |= {name: joined[digits * i : digits * (i + 1)] for i, name in enumerate(names)}
        elif joined is not None:
            wanted = " or ".join(map(str, DIGITS))
            failures.append(f"{shard}: {Rondel.TENSOR_SHA256} should hold {wanted} digits a tensor of {len(names)}")
    return hashes


def _base_of_file(file: File, hashes: dict[str, str]) -> list[str]:
    """Whether the copies belong to these weights, where export cannot have converted the weights."""
    from rondel.converters.gguf_reader import GgufFile
    from rondel.converters.manifest import PLAIN
    from rondel.converters.replication_keys import replicated_layers

    record = GgufFile(Path(file.shards[0])).keys
    prefixes = tuple(f"blk.{layer}." for layer in replicated_layers(record))
    bases = [tensor for tensor in file.tensors if prefixes and tensor.name.startswith(prefixes)]
    converted = any(tensor.format in PLAIN and len(tensor.shape) > 1 for tensor in bases)
    if converted or any(len(hashes.get(tensor.name, "")) < max(DIGITS) for tensor in bases):
        return []
    return _base(record, hashes)


def _base(record: Mapping[str, Any], hashes: Mapping[str, str]) -> list[str]:
    """A sentence where replicated layers are not those that their copies were made for."""
    from rondel.converters.gguf_keys import Rondel
    from rondel.converters.replication_keys import base_sha256, replicated_layers

    key, layers = Rondel.REPLICATION + "base.sha256", replicated_layers(record)
    if not layers or key not in record or record[key] == base_sha256(hashes, layers):
        return []
    return [f"{key}: the copies were made for other weights of layers {', '.join(map(str, layers))}; replicate again"]


def _gaps(file: File) -> list[str]:
    """A sentence for each tensor that does not begin, aligned, where the one before it ends, and for what is behind."""
    failures = []
    ends: dict[int, int] = {}
    for tensor in file.tensors:
        expected = ends.get(tensor.shard, tensor.offset)  # the first one's place is checked by the parser
        if tensor.offset != expected:
            failures.append(f"{tensor.name}: begins at byte {tensor.offset}, expected {expected}")
        end = tensor.offset + tensor.bytes
        ends[tensor.shard] = -(-end // file.alignment) * file.alignment
    for number, end in ends.items():
        size = Path(file.shards[number]).stat().st_size
        if size > end:
            failures.append(f"{file.shards[number]}: {size - end} bytes follow the last tensor")
    return failures


def verify_folder(path: Path, progress: Progress) -> tuple[dict[str, Any], list[str]]:
    """What was checked in a stage's folder, and a sentence for each thing that is wrong."""
    from rondel.converters.manifest import read_manifest, sha256_of_span, shard_spans, tensor_infos

    manifest = read_manifest(path)
    infos = tensor_infos(manifest)
    spans = {shard: shard_spans(path / shard) for shard in dict.fromkeys(info.shard for info in infos.values())}
    failures, stored = [], 0
    for done, info in enumerate(infos.values()):
        progress(done, len(infos), info.name)
        span = spans[info.shard].get(info.name)
        if span is None:
            failures.append(f"{info.name}: is in the manifest and not in {info.shard}")
            continue
        stored += span[1] - span[0]
        if sha256_of_span(path / info.shard, span) != info.sha256:
            failures.append(f"{info.name}: its bytes in {info.shard} differ from the manifest")
    progress(len(infos), len(infos), "verified")
    failures += _base(_record(manifest), {name: info.sha256 for name, info in infos.items()})
    failures += _matrices(path, manifest)
    return {"tensors": len(infos), "bytes": stored, "hashes_compared": len(infos)}, failures


def _matrices(path: Path, manifest: dict[str, Any]) -> list[str]:
    """A sentence for each matrix of a rotation that is not the one the manifest tells of."""
    from rondel.converters.manifest import sha256_of_span, shard_spans
    from rondel.converters.rotation import MATRICES, matrix_name

    records = manifest.get("rotations")
    hashes = {
        matrix_name(index): record["sha256"]
        for index, record in enumerate(records if isinstance(records, list) else [])
        if isinstance(record, dict) and record.get("sha256") is not None
    }
    # Statistics tell of the basis too; the matrices lie beside the model's weights.
    if not hashes or manifest.get("kind") != "checkpoint":
        return []
    file = path / f"{MATRICES}.safetensors"
    spans = shard_spans(file)
    wrong = [name for name in hashes if name not in spans or sha256_of_span(file, spans[name]) != hashes[name]]
    return [f"{name}: its bytes in {file.name} differ from the manifest" for name in wrong]


def _record(manifest: dict[str, Any]) -> dict[str, Any]:
    record = manifest.get("replication")
    return record if isinstance(record, dict) else {}


def _text(told: dict[str, Any]) -> str:
    hashes = f", {told['hashes_compared']} hashes equal" if told["hashes_compared"] else ", no hashes to compare"
    other = f", {told['converted_by_export']} converted by export" if told.get("converted_by_export") else ""
    return f"{told['path']}: {told['tensors']} tensors, {console.size(told['bytes'])}: correct{hashes}{other}"
