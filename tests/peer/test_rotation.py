"""Rotated files without rounding say in unmodified llama.cpp what the model said before."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from llama import Llama, find_library

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.export import ExportConfig, export
from rondel.quant.perplexity import log_softmax
from rondel.quant.rotate import RotateConfig, rotate

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(find_library() is None, reason="unmodified llama.cpp is not installed (make install-peer)"),
]

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "tests" / "models" / "stories-4m"
TEXT = ROOT / "tests" / "models" / "stories.txt"
TOKENS = 512
MEAN_KL = 1e-5  # nats a token: rounding to F32 alone; a forgotten gain costs whole nats
SAME_TOP = 0.999  # of the positions
SAME_PERPLEXITY = 1e-4  # relative: its cache of keys and values is F16
ROTATIONS = {
    "hadamard": RotateConfig(),
    "orthogonal": RotateConfig(kind="orthogonal", seed=2),
    "heads": RotateConfig(residual=False),
}


def run(path: Path) -> tuple[np.ndarray, float]:
    """Logarithms of the probabilities (TOKENS, vocabulary), and the perplexity."""
    with Llama(path, context=TOKENS, threads=1) as peer:
        tokens = peer.tokenize(TEXT.read_text(encoding="utf-8")[: 8 * TOKENS])[:TOKENS]
        found = log_softmax(peer.eval(tokens))
    return found, float(np.exp(-found[np.arange(TOKENS - 1), tokens[1:]].mean()))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, float]:
    (path,) = export(open_checkpoint(DEMO), tmp_path_factory.mktemp("plain") / "m.gguf", ExportConfig(type="F32"))
    return run(path)


@pytest.mark.parametrize("which", ROTATIONS)
def test_llama_cpp_runs_a_rotated_model_as_the_plain_one(
    which: str, plain: tuple[np.ndarray, float], tmp_path: Path
) -> None:
    rotated = rotate(open_checkpoint(DEMO), tmp_path / "rotated", ROTATIONS[which])
    (path,) = export(rotated, tmp_path / "m.gguf", ExportConfig(type="F32"))
    expected, perplexity = plain
    turned, other = run(path)
    assert len(turned) == TOKENS
    divergence = (np.exp(expected) * (expected - turned)).sum(-1)
    assert divergence.mean() < MEAN_KL
    assert (turned.argmax(-1) == expected.argmax(-1)).mean() > SAME_TOP
    assert abs(other / perplexity - 1) < SAME_PERPLEXITY
