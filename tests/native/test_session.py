"""Sessions: logits against float64, the same bits for any batch and thread count, bounds, counters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from rondel.native import Model, NativeError, Session
from tests.native.reference import Numbers, forward, plain_steps, random_weights, write_gguf

# Float32 arithmetic over three layers of 32 to 48 terms: a few ulps of the largest logit; wrong is 1e-1.
LARGEST_ERROR = 1e-5
TOKENS = [3, 17, 5, 59, 0, 3, 3, 41, 22, 8, 13, 58, 2]
VARIANTS = {
    "llama": Numbers(),
    "llama-tied": Numbers(tied=True),
    "llama-biases": Numbers(biases=True),
    "llama-rope-factors": Numbers(rope_factors=True, rope_base=500000.0),
    "llama-linear-rope": Numbers(rope_factor=4.0),
    "qwen2": Numbers("qwen2", biases=True, tied=True),
    "qwen3": Numbers("qwen3", head_dim=12),
    "one-kv-head": Numbers("qwen3", heads=5, kv_heads=1),
}
MODELS = Path(__file__).parents[3] / "shared" / "models"


def make(
    tmp_path: Path, numbers: Numbers = VARIANTS["llama"], quantized: gguf.GGMLQuantizationType | None = None
) -> Path:
    return write_gguf(tmp_path / "model.gguf", numbers, random_weights(numbers), quantized=quantized)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_float64(variant: str, tmp_path: Path) -> None:
    numbers = VARIANTS[variant]
    weights = random_weights(numbers)
    expected = forward(numbers, weights, TOKENS, plain_steps(numbers.layers), [0] * numbers.layers)
    with Model(write_gguf(tmp_path / "m.gguf", numbers, weights)) as model, Session(model, threads=1) as session:
        assert relative(session.eval(TOKENS, all=True), expected) < LARGEST_ERROR


def test_half_precision_cache_is_close(tmp_path: Path) -> None:
    with Model(make(tmp_path)) as model:
        exact = Session(model, kv="F32", threads=1).eval(TOKENS)
        half = Session(model, kv="F16", threads=1).eval(TOKENS)
    assert 0 < relative(half, exact) < 2e-2  # halves have 11 bits; softmax of large scores widens that


@pytest.mark.parametrize("quantized", [None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16])
@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (5, 1), (512, 2), (3, 3)])
def test_any_batch_and_any_threads_give_the_same_bits(
    quantized: gguf.GGMLQuantizationType | None, batch: int, threads: int, tmp_path: Path
) -> None:
    numbers = Numbers("qwen3", width=64, hidden=96)
    with Model(make(tmp_path, numbers, quantized)) as model:
        expected = Session(model, threads=1).eval(TOKENS, all=True)
        with Session(model, batch=batch, threads=threads) as session:
            assert np.array_equal(session.eval(TOKENS, all=True), expected)
            assert np.array_equal(session.eval(TOKENS, 0), expected[-1:])


def test_token_by_token_equals_prefill(tmp_path: Path) -> None:
    with Model(make(tmp_path)) as model:
        expected = Session(model, threads=1).eval(TOKENS, all=True)
        session = Session(model, threads=2)
        steps = [session.eval([token]) for token in TOKENS]
    assert np.array_equal(np.concatenate(steps), expected)


def test_going_back_forgets_what_came_later(tmp_path: Path) -> None:
    with Model(make(tmp_path)) as model:
        session = Session(model, threads=1)
        first = session.eval(TOKENS)
        session.eval([9, 9, 9, 9])
        assert session.length == len(TOKENS) + 4
        assert np.array_equal(session.eval(TOKENS[4:], position=4), first)
        assert session.length == len(TOKENS)


def test_prefill_without_logits_fills_the_cache(tmp_path: Path) -> None:
    with Model(make(tmp_path)) as model:
        expected = Session(model, threads=1).eval(TOKENS)
        session = Session(model, threads=1)
        session.prefill(TOKENS[:-1])
        assert np.array_equal(session.eval(TOKENS[-1:]), expected)


def test_bytes_read_counts_weights_once_and_the_cache(tmp_path: Path) -> None:
    numbers = VARIANTS["llama"]
    with Model(make(tmp_path)) as model:
        session = Session(model, threads=1, kv="F16")
        session.eval([1])
        weights = random_weights(numbers)
        one = sum(tensor.nbytes for name, tensor in weights.items() if name != "token_embd.weight") + 4 * numbers.width
        cached = numbers.layers * 2 * numbers.kv_heads * numbers.head_dim * 2  # bytes of a token: keys and values
        assert session.bytes_read == one + cached
        session.eval(TOKENS)
        row = 4 * numbers.width * (len(TOKENS) - 1)
        assert session.bytes_read == one + row + cached * (len(TOKENS) + 1)


def test_memory_grows_with_the_context(tmp_path: Path) -> None:
    numbers = VARIANTS["llama"]
    with Model(make(tmp_path)) as model:
        small, large = (Session(model, context=n, batch=8, threads=1, kv="F16").memory for n in (1024, 2048))
    cached = numbers.layers * 2 * numbers.kv_heads * numbers.head_dim * 2
    assert large - small == 1024 * (cached + 4)  # and one score for each position


def test_bounds_are_sentences(tmp_path: Path) -> None:
    with Model(make(tmp_path)) as model:
        session = Session(model, context=4, threads=1)
        with pytest.raises(NativeError, match="5 tokens at position 0 do not fit into the context of 4"):
            session.eval([1, 2, 3, 4, 5])
        with pytest.raises(NativeError, match="token 60 is outside the vocabulary of 60"):
            session.eval([60])
        with pytest.raises(NativeError, match="token -1 is outside"):
            session.eval([-1])
        with pytest.raises(NativeError, match="position 1: the session holds 0"):
            session.eval([1], position=1)
        with pytest.raises(NativeError, match="at least one token"):
            session.eval([])
        assert session.length == 0
        for wrong in ({"context": 0}, {"batch": 0}, {"threads": 0}, {"kv": "Q8"}):
            with pytest.raises(NativeError):
                Session(model, **wrong)  # type: ignore[arg-type]


def test_numbers_beyond_32_bits_are_refused(tmp_path: Path) -> None:
    with Model(make(tmp_path)) as model:
        for settings in ({"context": 10**12}, {"threads": 10**12}):
            with pytest.raises(NativeError, match="must be"):
                Session(model, **settings)


def test_two_sessions_share_a_model_without_mixing(tmp_path: Path) -> None:
    with Model(make(tmp_path)) as model:
        a, b = Session(model, threads=1), Session(model, threads=1)
        expected = a.eval(TOKENS)
        a.eval(TOKENS[:3], 0)
        b.eval([7, 7, 7, 7])
        assert np.array_equal(a.eval(TOKENS[3:]), expected)


def test_a_scale_tensor_scales_the_output_of_its_matrix(tmp_path: Path) -> None:
    numbers = VARIANTS["llama"]
    weights = random_weights(numbers)
    scaled = dict(weights)
    scaled["blk.1.ffn_down.scale"] = np.array([0.5], np.float32)
    folded = dict(weights) | {"blk.1.ffn_down.weight": weights["blk.1.ffn_down.weight"] * np.float32(0.5)}
    logits = []
    for name, tensors in (("scaled", scaled), ("folded", folded)):
        with Model(write_gguf(tmp_path / name, numbers, tensors)) as model:
            logits.append(Session(model, threads=1).eval(TOKENS))
    assert np.array_equal(*logits)  # half is exact


def test_a_model_tells_its_numbers(tmp_path: Path) -> None:
    numbers = replace(VARIANTS["llama"], layers=5)
    with Model(make(tmp_path, numbers)) as model:
        assert (model.layers, model.steps(), model.vocabulary, model.width) == (5, 5, numbers.vocabulary, numbers.width)
        assert model.context == numbers.context


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_reference_losses_of_trained_models(name: str, tmp_path: Path) -> None:
    folder = MODELS / name
    if not folder.exists():
        pytest.skip(f"{folder} is not on this machine")
    pytest.importorskip("torch")
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.converters.export import ExportConfig, export

    reference = json.loads((folder / "eval" / "reference.json").read_text())
    ids = np.fromfile(folder / "eval" / "ids.i32", "<i4")
    path = tmp_path / "model.gguf"
    export(open_checkpoint(folder), path, ExportConfig(type="F32"))
    total, count, at = 0.0, 0, 0
    with Model(path) as model, Session(model, context=max(reference["lengths"])) as session:
        for length in reference["lengths"]:
            tokens = ids[at : at + length]
            at += length
            logits = session.eval(tokens[:-1], 0, all=True).astype(np.float64)
            logits -= logits.max(1, keepdims=True)
            total += float((np.log(np.exp(logits).sum(1)) - logits[np.arange(length - 1), tokens[1:]]).sum())
            count += length - 1
    assert count == reference["predicted_tokens"]
    assert abs(total / count - reference["mean_nll_nats"]) < 1e-5  # both are float32 at best; three digits are asked
