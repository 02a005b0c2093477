"""The file of log-probabilities: what is written comes back, llama.cpp's layout byte by byte, and damage is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rondel.converters.errors import RondelError
from rondel.converters.logits import LogitsFile, LogitsWriter, decode_rows, encode_rows, row_bytes, scored_rows
from rondel.quant.perplexity import log_softmax

CONTEXT, VOCABULARY, WINDOWS = 8, 11, 3  # an odd vocabulary: rows are padded
# A code is the nearest of 65536 steps over at most 16 nats; float32 adds a few roundings of numbers below 32.
HALF_STEP = 16 / 65535 / 2 + 4e-6


def logits(rows: int, spread: float = 3.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, VOCABULARY)) * spread).astype(np.float32)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    tokens = np.arange(WINDOWS * CONTEXT, dtype=np.int32).reshape(WINDOWS, CONTEXT) % VOCABULARY
    with LogitsWriter(tmp_path / "base.bin", tokens, VOCABULARY) as writer:
        for window in range(WINDOWS):
            writer.write(logits(scored_rows(CONTEXT), seed=window))
    return tmp_path / "base.bin"


def test_what_is_written_comes_back(written: Path) -> None:
    file = LogitsFile(written)
    assert (file.context, file.vocabulary, file.windows) == (CONTEXT, VOCABULARY, WINDOWS)
    assert file.tokens[1, 0] == CONTEXT
    for window in range(WINDOWS):
        expected = log_softmax(logits(scored_rows(CONTEXT), seed=window))
        assert np.abs(file.rows(window) - expected).max() <= HALF_STEP
        assert np.array_equal(file.rows(window, 1, 1), file.rows(window)[1:2])
    assert list(written.parent.iterdir()) == [written]


def test_layout_is_llama_cpps(written: Path) -> None:
    data = written.read_bytes()
    assert data[:20] == struct.pack("<8sIii", b"_logits_", CONTEXT, VOCABULARY, WINDOWS)
    assert len(data) == 20 + 4 * WINDOWS * CONTEXT + WINDOWS * 3 * (8 + 2 * (VOCABULARY + 1))
    row = data[20 + 4 * WINDOWS * CONTEXT :]
    scale, lowest = struct.unpack_from("<2f", row)
    codes = struct.unpack_from(f"<{VOCABULARY}H", row, 8)
    assert max(codes) == 65535
    assert min(codes) == 0
    assert np.exp([scale * code + lowest for code in codes]).sum() == pytest.approx(1, abs=1e-3)  # 16-bit probabilities


def test_less_likely_than_16_nats_is_cut_off() -> None:
    row = np.zeros((1, VOCABULARY), np.float32)
    row[0, 0], row[0, 1] = 40.0, 30.0
    decoded = decode_rows(np.frombuffer(encode_rows(row), np.uint8).reshape(1, -1), VOCABULARY)
    assert decoded[0, 1] == pytest.approx(-10, abs=HALF_STEP)
    assert decoded[0, 2] == pytest.approx(-16, abs=HALF_STEP)


def test_equal_logits_have_no_scale() -> None:
    packed = np.frombuffer(encode_rows(np.ones((2, VOCABULARY), np.float32)), np.uint8).reshape(2, -1)
    assert np.allclose(decode_rows(packed, VOCABULARY), -np.log(VOCABULARY))


def test_an_error_while_writing_leaves_no_file(tmp_path: Path) -> None:
    tokens = np.zeros((1, CONTEXT), np.int32)
    with pytest.raises(KeyboardInterrupt), LogitsWriter(tmp_path / "base.bin", tokens, VOCABULARY):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def _changed(at: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda old: old[:at] + data + old[at + len(data) :]


FIRST_ROW = 20 + 4 * WINDOWS * CONTEXT


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: b"", "not a file of logits"),
        (lambda data: b"GGUF" + data[4:], "not a file of logits"),
        (lambda data: data[:-1], "bytes, expected"),
        (lambda data: data + b"\0", "bytes, expected"),
        (_changed(8, b"\0\0\0\0"), "damaged header: context 0"),
        (_changed(8, b"\xff\xff\xff\xff"), "damaged header: context 4294967295"),
        (_changed(12, b"\xff\xff\xff\xff"), "vocabulary -1"),
        (_changed(16, b"\0\0\0\0"), "windows 0"),
        (_changed(16, b"\xff\xff\xff\x7f"), "bytes, expected"),
        (_changed(20, struct.pack("<i", VOCABULARY)), "tokens outside its vocabulary"),
        (_changed(20, struct.pack("<i", -1)), "tokens outside its vocabulary"),
        (_changed(FIRST_ROW, struct.pack("<f", float("nan"))), "no log-probabilities"),
        (_changed(FIRST_ROW, struct.pack("<f", -1.0)), "no log-probabilities"),
        (_changed(FIRST_ROW + 4, struct.pack("<f", float("inf"))), "no log-probabilities"),
        (_changed(FIRST_ROW + 4, struct.pack("<f", 700.0)), "no log-probabilities"),
    ],
)
def test_damage_is_one_sentence(written: Path, damage: Callable[[bytes], bytes], sentence: str) -> None:
    written.write_bytes(damage(written.read_bytes()))
    with pytest.raises(RondelError) as caught:
        LogitsFile(written).rows(0)
    assert sentence in str(caught.value)
    assert str(written) in str(caught.value)


def test_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RondelError, match="cannot be read"):
        LogitsFile(tmp_path / "none")


def test_row_bytes_are_even_and_hold_the_head() -> None:
    assert [row_bytes(size) for size in (1, 2, 3, 32000)] == [12, 12, 16, 64008]
