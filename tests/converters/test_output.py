"""The folder a stage writes: killed before any call that touches the disk, damaged, shared, or in somebody's way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rondel.converters import output as output_module
from rondel.converters.errors import RondelError
from rondel.converters.folder import Packed, TensorFolder
from rondel.converters.journal import JOURNAL, unlock
from rondel.converters.manifest import MANIFEST, read_manifest
from rondel.converters.output import StageOutput

SHARDS = ["embedding", "blk-00000", "output"]
STAGE = {"name": "test", "version": "1", "config": {"sizes": (1, 2)}, "inputs": {"source": "ab"}}
OTHER = STAGE | {"config": {"sizes": (1, 3)}}
# Built-in functions that change what is on the disk: the run is killed before each of their calls.
TOUCHING = {
    "open",
    "write",
    "flush",
    "fsync",
    "replace",
    "rename",
    "unlink",
    "mkdir",
    "rmdir",
    "link",
    "serialize_file",
}


def run_stage(
    out: Path, stage: dict[str, Any] = STAGE, *, force: bool = False, written: list[str] | None = None
) -> None:
    """A stage of three shards, one of them packed, with a side file."""
    output = StageOutput(out, stage, force=force)
    if output.finished:
        return
    for index, shard in enumerate(SHARDS):
        if not output.done(shard):
            values = torch.arange(12, dtype=torch.float32).reshape(3, 4) + index
            packed = Packed(torch.arange(34, dtype=torch.uint8), "Q8_0", (1, 32))
            output.write(shard, {f"{shard}.a": values, f"{shard}.b": packed}, result=[index])
            if written is not None:
                written.append(shard)
    side = out.parent / "side.json"
    side.write_text("{}")
    results = [output.result(shard) for shard in SHARDS]
    output.finish(SHARDS, {"kind": "test", "results": results, "stages": [output.stage]}, {"config.json": side})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def in_child(run: Callable[[], None], kill_before: int | None) -> int:
    """Run in a forked child that is killed before its n-th touching call; how many there were, or -1 if killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0

        def count(frame: Any, event: str, called: Any) -> None:
            nonlocal calls
            if event == "c_call" and getattr(called, "__name__", "") in TOUCHING:
                if calls == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1

        try:
            sys.setprofile(count)
            run()
            sys.setprofile(None)
            os.write(writer, str(calls).encode())
        finally:
            os._exit(0)
    os.close(writer)
    told = os.read(reader, 16)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (kill_before is not None and not told)
    return int(told) if told else -1


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_before_any_call_the_next_run_ends_with_the_same_bytes(replacing: bool, tmp_path: Path) -> None:
    run_stage(tmp_path / "undisturbed" / "out")
    expected = contents(tmp_path / "undisturbed" / "out")

    def prepare(place: Path) -> Path:
        place.mkdir()
        if replacing:
            run_stage(place / "out", OTHER)
        return place / "out"

    total = in_child(lambda: run_stage(prepare(tmp_path / "count"), force=replacing), None)
    assert total > 20
    for kill_before in range(total):
        place = tmp_path / f"killed-{kill_before}"
        out = prepare(place)
        if in_child(lambda out=out: run_stage(out, force=replacing), kill_before) >= 0:  # type: ignore[misc]
            break
        if replacing:  # at every moment one whole output is on the disk
            assert (out / MANIFEST).is_file() or (place / "out.partial" / MANIFEST).is_file()
        run_stage(out, force=replacing)
        assert contents(out) == expected
        assert {path.name for path in place.iterdir()} == {"out", "side.json"}
        run_stage(out)  # a no-op
        assert contents(out) == expected
        shutil.rmtree(place)


def test_a_killed_process_resumes_behind_its_last_shard(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from rondel.converters.output import StageOutput\n"
        "output = StageOutput(Path(sys.argv[1]), {'name': 'test'})\n"
        "output.write('embedding', {'a': torch.ones(3)}, result=7)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=False)
    assert killed.returncode == -signal.SIGKILL
    output = StageOutput(tmp_path / "out", {"name": "test"})
    assert output.done("embedding")
    assert output.result("embedding") == 7
    assert not (tmp_path / "out").exists()


def unfinished(tmp_path: Path) -> Path:
    """Two shards of three written, nothing renamed."""
    out = tmp_path / "out"
    output = StageOutput(out, STAGE)
    for shard in SHARDS[:2]:
        output.write(shard, {f"{shard}.a": torch.ones(2)})
    unlock(output.partial)
    return out


def cut_the_journal(partial: Path) -> None:
    path = partial / JOURNAL
    path.write_bytes(path.read_bytes()[:-5])


def garble_a_line(partial: Path) -> None:
    lines = (partial / JOURNAL).read_bytes().split(b"\n")
    lines[2] = b"\xff\x00" + lines[2][2:]
    (partial / JOURNAL).write_bytes(b"\n".join(lines))


def flip_a_byte(partial: Path) -> None:
    path = partial / "blk-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        cut_the_journal,
        garble_a_line,
        flip_a_byte,
        lambda partial: (partial / "blk-00000.safetensors").unlink(),
        lambda partial: (partial / "blk-00000.safetensors").write_bytes(b""),
        lambda partial: shutil.copy(partial / "embedding.safetensors", partial / "blk-00000.safetensors"),
    ],
)
def test_a_shard_that_is_not_as_journaled_is_written_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    out = unfinished(tmp_path)
    damage(out.with_name("out.partial"))
    written: list[str] = []
    run_stage(out, written=written)
    assert written == ["blk-00000", "output"]
    assert not (out / JOURNAL).exists()


def test_an_unreadable_journal_begins_anew(tmp_path: Path) -> None:
    out = unfinished(tmp_path)
    (out.with_name("out.partial") / JOURNAL).write_bytes(b"\x00\xff")
    written: list[str] = []
    run_stage(out, written=written)
    assert written == SHARDS


def test_what_an_interrupted_write_left_does_not_reach_the_output(tmp_path: Path) -> None:
    out = unfinished(tmp_path)
    (out.with_name("out.partial") / "strange.safetensors.tmp").write_bytes(b"half")
    (out.with_name("out.partial") / "old-shard.safetensors").write_bytes(b"half")
    run_stage(out)
    assert set(contents(out)) == {MANIFEST, "config.json", *(f"{shard}.safetensors" for shard in SHARDS)}


def test_another_process_on_the_same_output_is_refused(tmp_path: Path) -> None:
    output = StageOutput(tmp_path / "out", STAGE)
    output.write("embedding", {"a": torch.ones(2)})

    script = (
        "import sys\nfrom pathlib import Path\n"
        "from rondel.converters.errors import RondelError\nfrom rondel.converters.output import StageOutput\n"
        "try:\n    StageOutput(Path(sys.argv[1]), {})\nexcept RondelError as error:\n    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=True, capture_output=True, text=True)
    assert "another run is writing it" in told.stdout
    assert output.done("embedding")
    assert (output.partial / "embedding.safetensors").is_file()


def test_other_settings_are_refused_without_force(tmp_path: Path) -> None:
    out = unfinished(tmp_path)
    with pytest.raises(RondelError, match="unfinished run with other inputs or settings"):
        StageOutput(out, OTHER)
    run_stage(out)
    before = contents(out)
    with pytest.raises(RondelError, match="output of another run"):
        StageOutput(out, OTHER)
    run_stage(out)
    assert contents(out) == before
    run_stage(out, OTHER, force=True)
    assert read_manifest(out)["stages"][-1]["config"] == {"sizes": [1, 3]}
    assert not out.with_name("out.partial").exists()


def test_what_no_stage_made_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "out"
    mine.mkdir()
    run_stage(mine)  # an empty folder is taken
    shutil.rmtree(mine)
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(RondelError, match="no rondel stage made it"):
            StageOutput(mine, STAGE, force=force)
    other = tmp_path / "b.partial"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(RondelError, match="no rondel stage made it"):
        StageOutput(tmp_path / "b", STAGE)
    assert (other / "thesis.txt").exists()


def test_the_working_folder_can_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_stage(Path())
    assert (tmp_path / "here" / MANIFEST).is_file()
    with pytest.raises(RondelError, match="root of the disk"):
        StageOutput(Path("/"), STAGE)


def test_a_finished_output_that_was_damaged_is_made_again_by_force(tmp_path: Path) -> None:
    run_stage(tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "output.safetensors").unlink()
    with pytest.raises(RondelError, match="--force"):
        StageOutput(tmp_path / "out", STAGE)
    run_stage(tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / MANIFEST).write_text("{")
    with pytest.raises(RondelError, match="--force"):
        StageOutput(tmp_path / "out", STAGE)
    run_stage(tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == before


def test_a_full_disk_is_one_sentence_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = StageOutput(tmp_path / "out", STAGE)
    output.write("embedding", {"a": torch.ones(2)})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output_module, "save_file", full)
    with pytest.raises(RondelError, match=r"blk-00000\.safetensors: cannot be written \(No space left on device\)"):
        output.write("blk-00000", {"b": torch.ones(2)})
    monkeypatch.undo()
    again = StageOutput(tmp_path / "out", STAGE)
    assert [again.done(shard) for shard in SHARDS] == [True, False, False]


def test_tensors_that_do_not_change_are_linked(tmp_path: Path) -> None:
    run_stage(tmp_path / "a")
    source = TensorFolder(tmp_path / "a", read_manifest(tmp_path / "a"))
    output = StageOutput(tmp_path / "b", OTHER)
    output.take("embedding", source, ["embedding.a", "embedding.b"])
    output.take("blk-00000", source, ["blk-00000.a"])  # not the whole file: written anew
    output.finish(["embedding", "blk-00000"], {"stages": [output.stage]})
    assert (tmp_path / "b" / "embedding.safetensors").samefile(tmp_path / "a" / "embedding.safetensors")
    taken = TensorFolder(tmp_path / "b", read_manifest(tmp_path / "b"))
    assert taken.names() == ["embedding.a", "embedding.b", "blk-00000.a"]
    assert all(taken.info(name) == source.info(name) for name in taken.names())
    assert torch.equal(taken.packed("embedding.b").data, source.packed("embedding.b").data)
    assert torch.equal(taken.read("blk-00000.a"), source.read("blk-00000.a"))


def test_files_are_as_readable_as_the_user_s_others(tmp_path: Path) -> None:
    run_stage(tmp_path / "out")
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {expected}


def test_the_manifest_names_no_place_on_this_machine(tmp_path: Path) -> None:
    run_stage(tmp_path / "out")
    text = (tmp_path / "out" / MANIFEST).read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["results"] == [[0], [1], [2]]
