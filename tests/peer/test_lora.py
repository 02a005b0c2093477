"""Low-rank corrections in unmodified llama.cpp: it loads the file, and adds what the file holds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from llama import Llama, find_library

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.export import ExportConfig, export
from rondel.converters.lora import write_lora
from rondel.quant.reference import ReferenceModel
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(find_library() is None, reason="unmodified llama.cpp is not installed (make install-peer)"),
]

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
CORRECTED = {"blk.0.attn_q.weight": 1, "blk.1.attn_output.weight": 3, "blk.1.ffn_down.weight": 5}  # and their ranks
SIZE = 0.3  # of the corrections' entries: they move the logits by far more than the tolerance
HALF_PRODUCTS = 4e-3  # of the largest logit: both factors, and what they read, are float16 there


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_llama_cpp_adds_the_correction(family: str, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(family, tmp_path / "m"))
    (file,) = export(source, tmp_path / "m.gguf", ExportConfig(type="F32"))
    generator = np.random.default_rng(0)
    factors = {}
    for name, rank in CORRECTED.items():
        rows, cols = source.info(name).shape
        left, right = (generator.normal(size=shape) for shape in ((rows, rank), (rank, cols)))
        factors[name] = ((SIZE * left).astype(np.float32), (SIZE * right).astype(np.float32))
    write_lora(tmp_path / "lora.gguf", family, factors, "correction")

    corrected = ReferenceModel(source)
    read = source.read

    def with_correction(name: str) -> torch.Tensor:
        stored = read(name)
        return stored + torch.from_numpy(factors[name][0] @ factors[name][1]) if name in factors else stored

    base = ReferenceModel(source).logits(torch.tensor(TOKENS)).numpy()
    source.read = with_correction  # type: ignore[method-assign]
    expected = corrected.logits(torch.tensor(TOKENS)).numpy()
    with Llama(file, context=64, threads=1) as peer:
        plain = peer.eval(TOKENS)
        peer.correct(tmp_path / "lora.gguf")
        theirs = peer.eval(TOKENS)
        peer.correct(None)
        assert np.array_equal(peer.eval(TOKENS), plain)
    largest = np.abs(expected).max()
    assert np.abs(plain - base).max() < HALF_PRODUCTS * largest
    assert np.abs(theirs - expected).max() < HALF_PRODUCTS * largest
    assert np.abs(expected - base).max() > 10 * HALF_PRODUCTS * largest


def test_a_correction_of_another_model_is_refused(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("llama", tmp_path / "m"))
    (file,) = export(source, tmp_path / "m.gguf", ExportConfig(type="F32"))
    wrong = {"blk.0.attn_q.weight": (np.ones((8, 1), np.float32), np.ones((1, 8), np.float32))}
    write_lora(tmp_path / "lora.gguf", "llama", wrong, "correction")
    with Llama(file, context=64, threads=1) as peer, pytest.raises(ValueError, match=r"refuses lora\.gguf"):
        peer.correct(tmp_path / "lora.gguf")
