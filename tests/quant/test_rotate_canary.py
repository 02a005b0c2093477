"""Quantized canaries: do rotated and rounded models still have the perplexities that they had?

A rotation that is right in float can still be rounded badly, and then only text tells. The texts are short, so the
numbers mean nothing beside other models'; they must not move.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.export import ExportConfig, export
from rondel.converters.stats import Stats, stats_for
from rondel.native import Model, Session
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.perplexity import log_softmax
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.rotate import RotateConfig, rotate

STORIES = Path(__file__).parents[1] / "models" / "stories-4m"
TEXT = STORIES.with_name("stories.txt")
CALIBRATION = CalibrateConfig(tokens=2048, context=128)
WINDOWS = 8  # of the calibration's own
# Relative: what another order of sums may do to codes, and they to the text. The divergence tells sooner.
PERPLEXITY_MOVED, DIVERGENCE_MOVED = 0.02, 0.1
RECIPES = {
    "as is": RotateConfig(rotate="never"),
    "rotated": RotateConfig(rotate="always"),
    "orthogonal": RotateConfig(rotate="always", kind="orthogonal"),
    "tied and online": RotateConfig(rotate="always", keep_tied=True, hidden="full", queries="full", target="rondel"),
}
KNOWN = {  # perplexity, and mean divergence from the float model in nats
    "as is": {"Q4_0": (16.76, 0.005995), "Q2_K": (17.93, 0.03342)},
    "rotated": {"Q4_0": (16.79, 0.007633), "Q2_K": (17.39, 0.05978)},
    "orthogonal": {"Q4_0": (16.85, 0.007797), "Q2_K": (17.42, 0.06201)},
    "tied and online": {"Q4_0": (16.85, 0.005542), "Q2_K": (16.77, 0.03456)},
}

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="there is no model to measure")


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return open_checkpoint(STORIES)


@pytest.fixture(scope="module")
def stats(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return calibrate(source, tmp_path_factory.mktemp("stories") / "calib", CALIBRATION, [TEXT], threads=1)


def logarithms(file: Path, windows: torch.Tensor) -> torch.Tensor:
    """Of the probabilities (windows, tokens, vocabulary) behind every token."""
    with Model(file) as model:
        rows = []
        for window in windows.tolist():
            with Session(model, context=len(window), threads=1) as session:
                rows.append(torch.from_numpy(log_softmax(session.eval(window, all=True))))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def windows(stats: Stats) -> torch.Tensor:
    found = stats.windows()
    assert found is not None
    return found[:WINDOWS]


@pytest.fixture(scope="module")
def expected(source: Checkpoint, windows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    (file,) = export(source, tmp_path_factory.mktemp("float") / "float.gguf", ExportConfig())
    return logarithms(file, windows)


@pytest.mark.parametrize("recipe", RECIPES)
def test_perplexities_stay(
    recipe: str, source: Checkpoint, stats: Stats, windows: torch.Tensor, expected: torch.Tensor, tmp_path: Path
) -> None:
    made = rotate(source, tmp_path / "rotated", RECIPES[recipe], stats, threads=1)
    moved, measured = stats_for(made, None), {}
    for type_ in KNOWN[recipe]:
        quantized = quantize(made, tmp_path / type_, QuantizeConfig(type_, method="imatrix"), moved, threads=1)
        (file,) = export(quantized, tmp_path / f"{type_}.gguf", ExportConfig())
        found = logarithms(file, windows)
        losses = -found[:, :-1].gather(2, windows[:, 1:, None])
        divergence = (expected.exp() * (expected - found)).sum(-1)
        measured[type_] = float(losses.mean().exp()), float(divergence.mean())
    for type_, (perplexity, divergence) in KNOWN[recipe].items():
        assert measured[type_][0] == pytest.approx(perplexity, rel=PERPLEXITY_MOVED), measured
        assert measured[type_][1] == pytest.approx(divergence, rel=DIVERGENCE_MOVED), measured
