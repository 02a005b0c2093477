"""What an unfinished folder remembers: a journal of finished shards, and a lock against a second run."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rondel.converters.errors import RondelError

JOURNAL = "journal.jsonl"

# Folders that this process writes. The lock itself is the kernel's and ends with the process, however it ends.
_locked: dict[Path, int] = {}


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong while a file is written, a full disk above all, as one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RondelError(
            f"{path}: cannot be written ({reason}); what is finished is kept, run the same command again to go on"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the whole new one."""
    partial = path.with_name(path.name + ".tmp")
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)


def lock(folder: Path) -> None:
    """Make a folder if need be and keep other processes from writing to it; refuse where one does already."""
    unlock(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        renamed = not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat())
    except BlockingIOError:
        renamed = True
    except OSError:  # a file system without locks: two runs would be noticed by their journals' hashes alone
        renamed = False
    if renamed:
        os.close(descriptor)
        raise RondelError(f"{folder}: another run is writing it; wait for that one, or choose another -o")
    _locked[folder.absolute()] = descriptor


def unlock(folder: Path) -> None:
    """Give up this process's lock, if it has one."""
    descriptor = _locked.pop(folder.absolute(), None)
    if descriptor is not None:
        os.close(descriptor)


def read_journal(folder: Path) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The stage record and the finished shards by name; (None, {}) without a journal.

    A line that a kill or a full disk cut off ends the journal: what it would have said is not finished.
    """
    path = folder / JOURNAL
    if not path.is_file():
        return None, {}
    stage: Any = None
    shards: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if number == 0:
            stage = record
        elif (
            isinstance(record, dict)
            and isinstance(record.get("shard"), str)
            and isinstance(record.get("tensors"), dict)
        ):
            shards[record["shard"]] = record
        else:
            break
    return stage, shards


def start_journal(folder: Path, stage: Any, shards: Iterable[dict[str, Any]] = ()) -> None:
    """Write a whole journal anew."""
    write_atomically(folder / JOURNAL, "".join(json.dumps(record) + "\n" for record in (stage, *shards)))


def append_journal(folder: Path, record: dict[str, Any]) -> None:
    """Add a finished shard."""
    path = folder / JOURNAL
    with writing(path), path.open("a", encoding="utf-8") as journal:
        journal.write(json.dumps(record) + "\n")
        journal.flush()
        os.fsync(journal.fileno())
