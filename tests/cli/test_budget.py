"""`rondel quantize` with a budget: what --dry-run shows, and what is refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.program import rondel
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    (folder / "text.txt").write_text("once on a time there was the water " * 60, encoding="utf-8")
    made = tiny_model("llama", folder / "tiny")
    done = rondel(
        "calibrate", made, "--text", folder / "text.txt", "-o", folder / "calib", "--context", 32, "--tokens", 256, "-q"
    )
    assert done.code == 0, done.stderr
    return made


def dry_run(model: Path, *asked: str) -> tuple[int | str | None, str, str]:
    calib = model.parent / "calib"
    done = rondel("quantize", model, "--stats", calib, *asked, "--dry-run", "--quiet", "-o", model.parent / "out")
    return done.code, done.stdout, done.stderr


def test_dry_run_tells_the_table_and_the_size(model: Path) -> None:
    code, text, _ = dry_run(model, "--bpw", "6.5")
    assert code == 0
    assert "budget.file_bytes" in text
    head = next(line for line in text.splitlines() if line.startswith("name "))
    assert head.split() == ["name", "shape", "format", "bytes", "error", "cost"]
    code, text, _ = dry_run(model, "--size", "0.09M", "--json")
    planned = json.loads(text)
    assert code == 0
    assert planned["budget"]["most_bytes"] == 90_000 >= planned["budget"]["file_bytes"]
    assert (planned["config"]["type"], planned["config"]["size"]) == (None, 90_000)
    assert not (model.parent / "out").exists()


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["--size", "much"], "--size much: expected a number of bytes such as 500M or 2.5G"),
        (["--size", "1.5"], "--size 1.5: expected a number of bytes"),
        (["--size", "1k"], "--size 1000: the smallest file that this model fits has "),
        (["--bpw", "-1"], "--bpw -1.0: expected a positive number of bits"),
        (["--like", "Q2_K", "--type", "Q2_K"], "--like Q2_K: chooses the types itself; leave out --type Q2_K"),
        (["--like", "Q2_K", "--bpw", "2"], "--bpw and --like: each says how large the model may be; give one of them"),
    ],
)
def test_one_sentence(model: Path, asked: list[str], sentence: str) -> None:
    code, _, error = dry_run(model, *asked)
    assert code == 1
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
