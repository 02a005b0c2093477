"""`rondel replicate`: what it prints where, and how it refuses."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest
import torch

from rondel.quant import replication_trial
from tests.cli.program import Done, rondel
from tests.tiny import tiny_model

FAST = ("--context", "64", "--tokens", "18000", "--steps", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("replicate")
    tiny_model("qwen3", found / "m")
    drawn = random.Random(5)
    letters = "".join(drawn.choice(string.ascii_letters + " ") for _ in range(20_000))
    (found / "text.txt").write_text(letters, encoding="utf-8")
    assert rondel("quantize", found / "m", "-o", found / "q", "--type", "Q4_0", "--pure", "--quiet").code == 0
    return found


def replicate(folder: Path, out: Path, *arguments: str) -> Done:
    taught = ("--teacher", folder / "m", "--text", folder / "text.txt")
    return rondel("replicate", folder / "q", "-o", out, *taught, *FAST, *arguments)


def test_the_tuned_single_copy_is_told(folder: Path, tmp_path: Path) -> None:
    done = replicate(folder, tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout)["stages"][-1]["result"]
    assert result["tuning"]["kept"] is True
    assert result["losses"]["tuned"]["kl"] < result["losses"]["input"]["kl"]
    assert "tuned the single copy" in done.stderr
    quiet = replicate(folder, tmp_path / "again", "--no-tune", "--quiet")
    assert (quiet.code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_copies_that_harm_exit_with_three(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_gates(student, teacher, windows, found, parameters, config, **running):  # type: ignore[no-untyped-def]
        return [{kind: torch.ones(1) for kind in one} for one in found.sets]

    monkeypatch.setattr(replication_trial, "fit_copies", open_gates)
    done = replicate(folder, tmp_path / "out", "--layer", "0:serial:1", "--no-tune")
    assert done.code == 3
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "--allow-regression" in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = replicate(folder, tmp_path / "out", "--layer", "0:serial:1", "--no-tune", "--allow-regression", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["stages"][-1]["result"]["evaluation"]["regression"] is True


def test_tuning_without_a_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    done = rondel("replicate", folder / "q", "-o", tmp_path / "out", "--tune")
    assert done.code == 1
    assert "--teacher" in done.stderr


def test_what_was_compared_is_printed(folder: Path, tmp_path: Path) -> None:
    done = replicate(folder, tmp_path / "out", "--layer", "0:serial:1", "--no-tune", "--allow-regression")
    assert done.code == 0, done.stderr
    names = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert names[:4] == ["candidate", "teacher", "as it was", "copies"]
    assert "low rank" in names
    assert "more bits, equal reads" in names


def test_a_correction_instead_of_copies(folder: Path, tmp_path: Path) -> None:
    done = replicate(folder, tmp_path / "out", "--prefer", "low-rank", "--json")
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert Path(told["correction"]).is_file()
    assert [row["name"] for row in told["compared"]] == ["teacher", "as it was", "tuned", "low rank"]


def test_choosing_without_a_teacher_writes_none_with_a_note(folder: Path, tmp_path: Path) -> None:
    done = rondel("replicate", folder / "q", "-o", tmp_path / "out", "--mode", "auto")
    assert done.code == 0, done.stderr
    assert "no layer is replicated" in done.stderr
    assert (tmp_path / "out/manifest.json").is_file()


def test_a_dry_run_tells_the_candidates(folder: Path, tmp_path: Path) -> None:
    wanted = ("--layers", "0-1", "--parts", "ffn", "--mode", "parallel")
    done = replicate(folder, tmp_path / "out", *wanted, "--dry-run", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["candidates"] == ["0:parallel:1:ffn", "1:parallel:1:ffn"]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("layers", ["", "0,", "a", "0--1", "-1", "99999999999999-9"])
def test_a_list_of_layers_that_is_none_is_refused(layers: str, folder: Path, tmp_path: Path) -> None:
    done = replicate(folder, tmp_path / "out", f"--layers={layers}")
    assert done.code == 1
    assert "expected auto, or layers such as 0,3-5" in done.stderr
