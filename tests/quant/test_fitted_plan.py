"""Explicit plans with a teacher and text: fitted, judged on text that fitted nothing, refused where they harm."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RegressionError, RondelError
from rondel.converters.export import ExportConfig, export
from rondel.converters.gguf_reader import GgufFile
from rondel.native import Model
from rondel.quant import fitted_plan
from rondel.quant.replicate import NOT_FITTED, ReplicateConfig, replicate
from tests.tiny import tiny_model

CONTEXT = 64
CLOSED = 0.8  # of the gap to a planted teacher, as an honest fit of the right layer must
CONFIG = ReplicateConfig(("1:serial:1",), context=CONTEXT, steps=40, tokens=1 << 15)
EVAL = "rondel.replication.eval."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("qwen3", tmp_path_factory.mktemp("tiny") / "m", layers=3))


@pytest.fixture(scope="module")
def teacher(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return replicate(source, tmp_path_factory.mktemp("teacher") / "t", ReplicateConfig(("1:serial:1:0.5",)))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = random.Random(5)
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(drawn.choice(string.ascii_letters + " ") for _ in range(30_000)), encoding="utf-8")
    return path


def open_gates(student, teacher, windows, found, parameters, config, **running):
    """In the place of fit_copies: copies that surely harm a model that needs none."""
    return [{kind: torch.ones(1) for kind in one} for one in found.sets]


def test_a_named_layer_is_fitted_and_judged(
    source: Checkpoint, teacher: Checkpoint, text: Path, tmp_path: Path
) -> None:
    made = replicate(source, tmp_path / "out", CONFIG, teacher, (text,))
    result, keys = made.stages[-1]["result"], made.manifest["replication"]
    assert result["kl"]["high"] < 0
    assert keys[EVAL + "kl_repl"] < (1 - CLOSED) * keys[EVAL + "kl_base"]
    assert keys[EVAL + "regression"] is False
    assert NOT_FITTED not in result["notes"]
    assert any("help" in note for note in result["notes"])
    written = export(made, tmp_path / "m.gguf", ExportConfig())
    assert written
    assert GgufFile(tmp_path / "m.gguf").keys[EVAL + "n_ctx"] == CONTEXT
    assert not Model(tmp_path / "m.gguf").warnings
    again = replicate(source, tmp_path / "again", CONFIG, teacher, (text,), threads=1)
    assert again.manifest["replication"] == keys


def test_copies_that_harm_are_refused_or_stamped(
    source: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitted_plan, "fit_copies", open_gates)
    with pytest.raises(RegressionError, match=r"make the model worse.*--allow-regression"):
        replicate(source, tmp_path / "out", CONFIG, source, (text,))
    assert not any(tmp_path.iterdir())
    allowed = ReplicateConfig(**{**vars(CONFIG), "allow_regression": True})
    made = replicate(source, tmp_path / "out", allowed, source, (text,))
    assert made.manifest["replication"][EVAL + "regression"] is True
    export(made, tmp_path / "m.gguf", ExportConfig())
    assert any("worse" in warning for warning in Model(tmp_path / "m.gguf").warnings)


def test_what_cannot_be_fitted_is_refused(source: Checkpoint, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RondelError, match="--teacher"):
        replicate(source, tmp_path / "out", CONFIG, None, (text,))
    other = open_checkpoint(tiny_model("qwen3", tmp_path / "m", layers=1, vocabulary=320))
    with pytest.raises(RondelError, match="320 tokens"):
        replicate(source, tmp_path / "out", CONFIG, other, (text,))
    short = tmp_path / "short.txt"
    short.write_text("too little " * 50, encoding="utf-8")
    with pytest.raises(RondelError, match="give more --text"):
        replicate(source, tmp_path / "out", CONFIG, source, (short,))
