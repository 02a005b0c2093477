"""Where a stage writes: OUT.partial/, a journal of finished shards, and renames at the end.

Killed at any instant, the next run with the same inputs and config goes on behind the last finished shard. A finished
output with the same inputs and config is left as it is; with another config it is refused unless forced, and an old
output stays in its place until the new one is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rondel.converters.errors import RondelError
from rondel.converters.folder import PLAIN_FORMATS, Packed, TensorFolder, sha256_of
from rondel.converters.journal import (
    JOURNAL,
    append_journal,
    lock,
    read_journal,
    start_journal,
    sync,
    unlock,
    write_atomically,
    writing,
)
from rondel.converters.manifest import MANIFEST, MANIFEST_VERSION, read_manifest, sha256_of_span, shard_spans

__all__ = ["StageOutput", "write_atomically"]

REPLACED = ".replaced"  # OUT's former content, for the moment between two renames


def _entry(form: str, shape: Sequence[int], file: str, sha256: str) -> dict[str, Any]:
    return {"format": form, "shape": list(shape), "shard": file, "sha256": sha256}


def _remove(path: Path) -> None:
    """Remove a file or a folder, whichever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_whole(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether a journaled shard is on the disk with the bytes that were journaled."""
    try:
        entries = record["tensors"]
        path = folder / f"{record['shard']}.safetensors"
        spans = shard_spans(path)
        return spans.keys() == entries.keys() and all(
            sha256_of_span(path, span) == entries[name]["sha256"] for name, span in spans.items()
        )
    except (RondelError, OSError, KeyError, TypeError):
        return False


class StageOutput:
    """The folder a stage writes: `done`, `write` or `take` a shard at a time, then `finish`.

    `stage` is the record that the manifest keeps: {"name", "version", "config", "inputs"}; it decides whether an
    earlier output or an unfinished one is of the same run. `finished` tells that there is nothing left to do.
    `beside` names what the stage itself puts into the folder and takes care of: an interrupted run finds it again.
    """

    def __init__(self, out: Path, stage: dict[str, Any], *, force: bool = False, beside: Sequence[str] = ()) -> None:
        self.out = out = out if out.name not in ("", "..") else out.resolve()  # "." has no name to add to
        if not out.name:
            raise RondelError(f"{out}: is the root of the disk; choose another -o")
        self.beside = tuple(beside)
        self.stage = json.loads(json.dumps(stage))
        self.partial = out.with_name(out.name + ".partial")
        self._shards: dict[str, dict[str, Any]] = {}
        self.finished = self._check_finished(force)
        if not self.finished:
            lock(self.partial)
            try:
                self.finished = self._open_partial(force)
            except BaseException:
                unlock(self.partial)
                raise

    # ---- what is there already ----

    def _is_mine(self, manifest: Mapping[str, Any]) -> bool:
        stages = manifest.get("stages") or [{}]
        return {key: stages[-1].get(key) for key in self.stage} == self.stage

    def _check_finished(self, force: bool) -> bool:
        """Whether OUT is this run's finished output; refuse what must not be replaced."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        if not (self.out / MANIFEST).is_file():
            raise RondelError(f"{self.out}: exists and no rondel stage made it; choose another -o")
        try:
            manifest = read_manifest(self.out)
            mine = self._is_mine(manifest)
            if mine:
                for file in {entry["shard"] for entry in manifest["tensors"].values()}:
                    shard_spans(self.out / file)
        except RondelError as error:
            if force:
                return False
            raise RondelError(f"{error}; or use --force to make {self.out} again") from error
        if mine:
            self._drop_replaced()
        elif not force:
            raise RondelError(
                f"{self.out}: holds the output of another run (other inputs or settings); "
                "choose another -o, or use --force to replace it"
            )
        return mine

    def _open_partial(self, force: bool) -> bool:
        """Take up an unfinished run or begin one; True where only the last renames were missing."""
        stage, shards = read_journal(self.partial)
        if stage is None and (self.partial / MANIFEST).is_file():  # the journal ends before the renames begin
            if self._is_mine(read_manifest(self.partial)):
                self._put_in_place()
                return True
            stage = {}
        if stage == self.stage:
            self._shards = {name: record for name, record in shards.items() if _is_whole(self.partial, record)}
        elif stage is not None and not force:
            raise RondelError(
                f"{self.partial}: an unfinished run with other inputs or settings; remove it or use --force"
            )
        elif stage is None and not force and not self._is_fresh():
            raise RondelError(f"{self.partial}: is in the way and no rondel stage made it; remove it or use --force")
        beside = self.beside if stage == self.stage else ()
        self._keep_only({JOURNAL, *beside, *(f"{shard}.safetensors" for shard in self._shards)})
        start_journal(self.partial, self.stage, self._shards.values())
        return False

    def _is_fresh(self) -> bool:
        """Whether the partial folder holds nothing but, at most, a journal that is no longer readable."""
        return (self.partial / JOURNAL).exists() or all(p.name == f"{JOURNAL}.tmp" for p in self.partial.iterdir())

    def _keep_only(self, names: set[str]) -> None:
        """Remove what an interrupted write left behind."""
        for path in self.partial.iterdir():
            if path.name not in names:
                _remove(path)

    def done(self, shard: str) -> bool:
        """Whether an earlier, interrupted run finished this shard."""
        return shard in self._shards

    def result(self, shard: str) -> Any:
        """What was journaled with a finished shard."""
        return self._shards[shard]["result"]

    # ---- a shard at a time ----

    def write(self, shard: str, tensors: Mapping[str, torch.Tensor | Packed], result: Any = None) -> None:
        """Write one shard (a block of the model, say) and journal it. `result` must be JSON."""
        file = f"{shard}.safetensors"
        entries, raw = {}, {}
        for name, tensor in tensors.items():
            packed = isinstance(tensor, Packed)
            data = tensor.data if isinstance(tensor, Packed) else tensor
            raw[name] = data.detach().cpu().contiguous()
            form = tensor.format if isinstance(tensor, Packed) else PLAIN_FORMATS[tensor.dtype]
            assert packed or raw[name].dtype in PLAIN_FORMATS
            entries[name] = _entry(form, tensor.shape, file, sha256_of(raw[name]))
        temporary = self.partial / f"{file}.tmp"
        with writing(self.partial / file):
            save_file(raw, temporary)
            shutil.copymode(self.partial / JOURNAL, temporary)  # safetensors keeps its files from everybody else
            sync(temporary)
            temporary.replace(self.partial / file)
        self._journal(shard, entries, result)

    def take(self, shard: str, source: TensorFolder, names: Sequence[str], result: Any = None) -> None:
        """Give a shard the tensors of another folder unchanged: by a hard link where one file there holds just these.

        Finished folders are never written to again, so two of them can share a file.
        """
        infos = [source.info(name) for name in names]
        files = {info.shard for info in infos}
        held = {name for name in source.names() if source.info(name).shard in files}
        if not source.shareable or len(files) != 1 or held != set(names):
            tensors = {i.name: source.packed(i.name) if i.packed else source.read(i.name) for i in infos}
            self.write(shard, tensors, result)
            return
        file, stored = f"{shard}.safetensors", source.root / files.pop()
        temporary = self.partial / f"{file}.tmp"
        with writing(self.partial / file):
            temporary.unlink(missing_ok=True)
            try:
                os.link(stored, temporary)
            except OSError:  # another disk, or one without links
                shutil.copyfile(stored, temporary)
                sync(temporary)
            temporary.replace(self.partial / file)
        self._journal(shard, {i.name: _entry(i.format, i.shape, file, i.sha256) for i in infos}, result)

    def _journal(self, shard: str, entries: dict[str, Any], result: Any) -> None:
        record = json.loads(json.dumps({"shard": shard, "tensors": entries, "result": result}))
        append_journal(self.partial, record)
        self._shards[shard] = record

    # ---- the end ----

    def finish(self, shards: list[str], manifest: Mapping[str, Any], files: Mapping[str, Path] | None = None) -> None:
        """Write the manifest for `shards` in this order, copy side files by name, and put the folder in its place."""
        self._keep_only({JOURNAL, *self.beside, *(f"{shard}.safetensors" for shard in shards)})
        for name, source in (files or {}).items():
            with writing(self.partial / name):
                shutil.copyfile(source, self.partial / name)
                sync(self.partial / name)
        tensors = {name: entry for shard in shards for name, entry in self._shards[shard]["tensors"].items()}
        whole = {"manifest_version": MANIFEST_VERSION, **manifest, "tensors": tensors}
        assert self._is_mine(json.loads(json.dumps(whole))), (
            "the last of the manifest's stages must be this stage's record"
        )
        write_atomically(self.partial / MANIFEST, json.dumps(whole, indent=1) + "\n")
        (self.partial / JOURNAL).unlink()
        sync(self.partial)
        self._put_in_place()

    def abandon(self) -> None:
        """Leave nothing behind: for a refusal that comes before anything was written."""
        _remove(self.partial)
        unlock(self.partial)

    def _put_in_place(self) -> None:
        """Rename the complete folder to OUT. A kill between the renames leaves both, and the next run ends it."""
        with writing(self.out):
            replaced = self.out.with_name(self.out.name + REPLACED)
            if self.out.is_dir() and not any(self.out.iterdir()):
                self.out.rmdir()
            elif self.out.exists():
                self._drop_replaced()
                self.out.rename(replaced)
            self.partial.rename(self.out)
            sync(self.out.parent)
            self._drop_replaced()
        unlock(self.partial)

    def _drop_replaced(self) -> None:
        """Remove OUT's former content, its manifest last: that is how a later run knows it if this one is killed."""
        replaced = self.out.with_name(self.out.name + REPLACED)
        if not replaced.is_dir() or not ((replaced / MANIFEST).is_file() or not any(replaced.iterdir())):
            return
        for path in replaced.iterdir():
            if path.name != MANIFEST:
                _remove(path)
        _remove(replaced / MANIFEST)
        replaced.rmdir()
