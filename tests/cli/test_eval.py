"""`rondel eval`: the protocol on a real file, the logits file there and back, and bad input in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rondel.converters.logits import LogitsFile
from rondel.converters.tokenizer import Tokenizer
from rondel.native import Model, Session
from tests.cli.gguf_model import START, TOKENS, write_model
from tests.cli.program import rondel

CONTEXT = 32
TEXT = "the inner then other the thin on the end, " * 20 + "\n"
KEYS = ("perplexity", "nll", "tokens")
KL_KEYS = ("mean_kl", "median_kl", "kl_99_9", "same_top")
FLOAT32 = 1e-5  # relative: float32 logits summed in another order
SIXTEEN_BITS = 3e-4  # nats: the base file keeps log-probabilities in steps of up to 16/65535


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_model(folder / "a.gguf")
    write_model(folder / "b.gguf", seed=1)
    write_model(folder / "begins.gguf", **{"tokenizer.ggml.add_bos_token": True})
    (folder / "text").write_text(TEXT)
    return folder


def told(*arguments: str | Path) -> dict[str, Any]:
    done = rondel("eval", *arguments, "--json", "--quiet")
    assert done.code == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def expected_nll(path: Path, begin: int | None) -> list[float]:
    """By the definition, one window and one position after the other."""
    nll = []
    with Model(path) as model, Session(model, context=CONTEXT) as session:
        ids = Tokenizer(model.file.keys).encode(TEXT.removesuffix("\n"))
        for start in range(0, len(ids) - CONTEXT + 1, CONTEXT):
            window = ids[start : start + CONTEXT]
            shown = window if begin is None else [begin, *window[1:]]
            logits = session.eval(shown, 0, all=True).astype(np.float64)
            for position in range(CONTEXT // 2, CONTEXT - 1):
                row = logits[position]
                nll.append(float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[window[position + 1]]))
    return nll


@pytest.mark.parametrize(("name", "begin"), [("a.gguf", None), ("begins.gguf", START)])
def test_perplexity_is_that_of_the_definition(folder: Path, name: str, begin: int | None) -> None:
    found = told(folder / name, "--text", folder / "text", "--context", str(CONTEXT))
    nll = expected_nll(folder / name, begin)
    assert found["tokens"] == len(nll)
    assert found["nll"] == pytest.approx(np.mean(nll), rel=FLOAT32)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=FLOAT32)
    assert not set(KL_KEYS) & set(found)


def test_divergence_from_a_saved_base(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.bin"
    settings = ("--text", folder / "text", "--context", str(CONTEXT))
    saved = told(folder / "a.gguf", *settings, "--save-base", base)
    file = LogitsFile(base)
    assert (file.context, file.vocabulary, file.windows) == (CONTEXT, len(TOKENS), saved["windows"])

    same = told(folder / "a.gguf", *settings, "--base", base)
    assert {key: same[key] for key in KEYS} == {key: saved[key] for key in KEYS}
    assert abs(same["mean_kl"]) < SIXTEEN_BITS
    assert same["same_top"] == 1
    other = told(folder / "b.gguf", *settings, "--base", base)
    assert other["mean_kl"] > 0.1
    assert 0 <= other["same_top"] < 1
    assert other["base_perplexity"] == pytest.approx(saved["perplexity"], rel=SIXTEEN_BITS)
    # Text and context are in the file too.
    alone = told(folder / "b.gguf", "--base", base)
    assert {key: alone[key] for key in (*KEYS, *KL_KEYS)} == {key: other[key] for key in (*KEYS, *KL_KEYS)}


def test_chunks_are_the_first_windows(folder: Path, tmp_path: Path) -> None:
    settings = ("--text", folder / "text", "--context", str(CONTEXT))
    told(folder / "a.gguf", *settings, "--save-base", tmp_path / "base")
    few = told(folder / "a.gguf", *settings, "--chunks", "2")
    assert (few["windows"], few["tokens"]) == (2, 2 * (CONTEXT - 1 - CONTEXT // 2))
    assert told(folder / "a.gguf", *settings, "--chunks", "2", "--base", tmp_path / "base")["nll"] == few["nll"]


def test_text_for_people(folder: Path) -> None:
    done = rondel("eval", folder / "a.gguf", "--text", folder / "text", "--context", str(CONTEXT), "--chunks", "1")
    assert done.code == 0
    assert done.stdout.startswith("perplexity  ")
    assert "15 scored in 1 windows of 32" in done.stdout
    assert "window: 1/1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["a.gguf"], 2, "no text: give --text FILE"),
        (["a.gguf", "--base", "base", "--save-base", "base"], 2, "name the same file"),
        (["a.gguf", "--text", "text", "--context", "2"], 2, "--context"),
        (["a.gguf", "--text", "none"], 1, "none: cannot be read: No such file"),
        (["none.gguf", "--text", "text"], 1, "none.gguf"),
        (["text", "--text", "text"], 1, "GGUF"),
        (["a.gguf", "--text", "text", "--context", "5000"], 1, "tokens, less than one window of 5000"),
        (["a.gguf", "--text", "text", "--base", "text"], 1, "text: not a file of logits"),
        (["a.gguf", "--text", "other", "--base", "base"], 1, "base: made from another text or context"),
        (["a.gguf", "--text", "text", "--context", "16", "--base", "base"], 1, "its context is 32"),
        (["a.gguf", "--context", "16", "--base", "base"], 1, "base has windows of 32 tokens"),
        (["a.gguf", "--text", "text", "--context", "32", "--save-base", "."], 1, "cannot be written: it is a folder"),
        (["more.gguf", "--text", "text", "--base", "base"], 1, "logits over 265 tokens, this model has 266"),
        (
            ["a.gguf", "--text", "text", "--context", "32", "--save-base", "none/base"],
            1,
            "none/base: cannot be written",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.gguf", "text"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "other").write_text("on and on " * 200)
    told("a.gguf", "--text", "text", "--context", str(CONTEXT), "--save-base", "base")
    if "more.gguf" in arguments:
        write_model(tmp_path / "more.gguf", tokens=[*TOKENS, "more"])
    done = rondel("eval", *arguments, "--quiet")
    assert done.code == code
    assert sentence in " ".join(done.stderr.split())
    assert done.stdout == ""
