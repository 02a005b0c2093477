"""Where a stage writes: OUT.partial/, a journal of finished shards, and one rename at the end.

Killed at any instant, the next run with the same inputs and config goes on behind the last finished shard. A finished
output with the same inputs and config is left as it is; with another config it is refused unless forced.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rondel.converters.errors import RondelError
from rondel.converters.folder import FLOAT_FORMATS, MANIFEST, MANIFEST_VERSION, Packed, read_manifest, sha256_of

JOURNAL = "journal.jsonl"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the whole new one."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)


class StageOutput:
    """The folder a stage writes: `done` and `write` a shard at a time, then `finish`.

    `stage` is the record that the manifest keeps: {"name", "version", "config", "inputs"}; it decides whether an
    earlier output or an unfinished one is of the same run.
    """

    def __init__(self, out: Path, stage: dict[str, Any], *, force: bool = False) -> None:
        self.out = out
        self.stage = json.loads(json.dumps(stage))
        self.partial = out.with_name(out.name + ".partial")
        self._shards: dict[str, dict[str, Any]] = {}
        self.finished = self._check_finished(force)
        if not self.finished:
            self._open_partial(force)

    def _check_finished(self, force: bool) -> bool:
        if not self.out.exists():
            return False
        if self.out.is_dir() and not any(self.out.iterdir()):
            return False
        if not (self.out / MANIFEST).is_file():
            raise RondelError(f"{self.out}: exists and no rondel stage made it; choose another -o")
        stages = read_manifest(self.out).get("stages", [])
        if stages and {key: stages[-1].get(key) for key in self.stage} == self.stage:
            return True
        if not force:
            raise RondelError(
                f"{self.out}: holds the output of another run (other inputs or settings); "
                "choose another -o, or use --force to replace it"
            )
        return False

    def _open_partial(self, force: bool) -> None:
        journal = self.partial / JOURNAL
        if journal.is_file():
            lines = journal.read_text(encoding="utf-8").split("\n")
            records = [json.loads(line) for line in lines[:-1]]  # a torn last line has no newline: not finished
            if records and records[0] == self.stage:
                self._shards = {record["shard"]: record for record in records[1:]}
                if lines[-1]:
                    journal.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
                return
            if records and not force:
                raise RondelError(
                    f"{self.partial}: an unfinished run with other inputs or settings; remove it or use --force"
                )
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        journal.write_text(json.dumps(self.stage) + "\n", encoding="utf-8")

    def done(self, shard: str) -> bool:
        """Whether an earlier, interrupted run finished this shard."""
        return shard in self._shards

    def result(self, shard: str) -> Any:
        """What was journaled with a finished shard."""
        return self._shards[shard]["result"]

    def write(self, shard: str, tensors: Mapping[str, torch.Tensor | Packed], result: Any = None) -> None:
        """Write one shard (a block of the model, say) and journal it. `result` must be JSON."""
        file = f"{shard}.safetensors"
        entries = {}
        raw = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, Packed):
                raw[name] = tensor.data.contiguous()
                entry = {"format": tensor.format, "shape": list(tensor.shape)}
            else:
                raw[name] = tensor.detach().cpu().contiguous()
                entry = {"format": FLOAT_FORMATS[tensor.dtype], "shape": list(tensor.shape)}
            entries[name] = entry | {"shard": file, "sha256": sha256_of(raw[name])}
        temporary = self.partial / f"{file}.tmp"
        save_file(raw, temporary)
        _sync(temporary)
        temporary.replace(self.partial / file)
        record = {"shard": shard, "tensors": entries, "result": result}
        with (self.partial / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._shards[shard] = json.loads(json.dumps(record))

    def finish(self, shards: list[str], manifest: Mapping[str, Any], files: Mapping[str, Path] | None = None) -> None:
        """Write the manifest for `shards` in this order, copy side files by name, and put the folder in its place."""
        for name, source in (files or {}).items():
            shutil.copyfile(source, self.partial / name)
        tensors = {name: entry for shard in shards for name, entry in self._shards[shard]["tensors"].items()}
        whole = {"manifest_version": MANIFEST_VERSION, **manifest, "tensors": tensors}
        write_atomically(self.partial / MANIFEST, json.dumps(whole, indent=1) + "\n")
        (self.partial / JOURNAL).unlink()
        if self.out.exists():
            shutil.rmtree(self.out)
        self.partial.replace(self.out)
