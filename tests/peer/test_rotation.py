"""Rotated files without rounding say in unmodified llama.cpp what the model said before."""

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
from rondel.quant.perplexity import log_softmax
from rondel.quant.rotate import RotateConfig, rotate
from rondel.quant.rotation_choice import TURNED
from tests.cli.program import rondel
from tests.quant.turned import principal_axes, turned

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
RECOVERED = 1.15  # mean KL of a model that auto rotated, of that in its good basis
SPOILED = 1.5  # what principal axes must at least cost, or the test shows nothing
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


def command(*arguments: str | Path) -> None:
    done = rondel(*arguments, "--threads", "1", "--quiet")
    assert done.code == 0, done.stderr


def quantized(model: Path, calib: Path, type_: str, out: Path) -> np.ndarray:
    """What llama.cpp makes of the file that quantize and export make of a model."""
    command("quantize", model, "--stats", calib, "--type", type_, "--no-asymmetric", "-o", out)
    command("export", out, "-o", out.with_suffix(".gguf"))
    return run(out.with_suffix(".gguf"))[0]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model in its good basis and in its principal axes, both untied, and statistics of both."""
    source, folder = open_checkpoint(DEMO), tmp_path_factory.mktemp("bases")
    for name, matrix in {"good": torch.eye(source.numbers.width).double(), "poor": principal_axes(source)}.items():
        turned(source, matrix, folder / name)
        text = ["--text", TEXT, "--tokens", "2048", "--context", "256"]
        command("calibrate", folder / name, *text, "-o", folder / f"{name}-calib")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("type_", ["Q4_0", "Q2_K"])
def test_a_model_in_its_principal_axes_recovers(
    type_: str, bases: Path, plain: tuple[np.ndarray, float], tmp_path: Path
) -> None:
    """By default rotate turns it, and it rounds no worse than in the basis it came in."""
    rotated = tmp_path / "rotated"
    command("rotate", bases / "poor", "--stats", bases / "poor-calib", "--type", type_, "-o", rotated)
    assert open_checkpoint(rotated).manifest["rotation_choice"]["chosen"] in TURNED
    found = {
        name: quantized(bases / name, bases / f"{name}-calib", type_, tmp_path / name) for name in ("good", "poor")
    }
    found["rotated"] = quantized(rotated, rotated, type_, tmp_path / "quantized")
    expected = plain[0]
    kl = {basis: float((np.exp(expected) * (expected - one)).sum(-1).mean()) for basis, one in found.items()}
    assert kl["poor"] > SPOILED * kl["good"], kl
    assert kl["rotated"] < RECOVERED * kl["good"], kl
