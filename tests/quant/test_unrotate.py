"""Does a rotated model come back to the weights that it was made from, for every kind and placement?"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.rotation import GAINS
from rondel.converters.stats import Stats
from rondel.quant import optrot, procrustes
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.rotate import RotateConfig, rotate
from rondel.quant.rotated_view import RotatedView
from rondel.quant.rotator import Rotator
from rondel.quant.unrotate import Unrotator, plan_undo, undo
from rondel.quant.workers import Workers
from tests.tiny import tiny_model
from tests.tiny_sparse import tiny_sparse_model

STORED_F32 = 1e-6  # of a tensor's largest weight: two roundings to F32, and a sum over the channels
IN_FLOAT64 = 1e-13  # the same where nothing is stored in between: a transform there and one back
GONE = 1e-2  # what a rotation must at least have changed
STEPS = 2  # of the optimizers: any rotation must come back
ALL = RotateConfig(rotate="always", hidden="full", target="rondel")
CONFIGS = {
    "hadamard": RotateConfig(),
    "orthogonal": RotateConfig(kind="orthogonal"),
    "optrot": RotateConfig(kind="optrot"),
    "dfrot": RotateConfig(rotate="always", kind="dfrot"),
    "heads": RotateConfig(residual=False),
    "rope_pairs": RotateConfig(residual=False, heads=False, rope_pairs=True),
    "online": RotateConfig(keep_tied=True, queries="full", hidden="full", target="rondel"),
}
SPARSE = {
    "qwen3moe": ALL,
    "qwen3moe-tied": replace(ALL, keep_tied=True),
    "deepseek2": replace(ALL, rope_pairs=True),
    "deepseek2-lite": replace(ALL, rope_pairs=True),
    "deepseek3": replace(ALL, rope_pairs=True, hidden=8),
}
DENSE = replace(ALL, hidden="none", kind="orthogonal")  # stored matrices, of the latents and of every head as well


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optrot, "STEPS", STEPS)
    monkeypatch.setattr(procrustes, "ALTERNATIONS", STEPS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source") / "hf"
    return open_checkpoint(tiny_model("qwen2", folder, tied=True, layers=1, width=64, hidden=64))


@pytest.fixture(scope="module")
def stats(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    tokens = torch.randint(0, source.numbers.vocabulary, (4, 16), generator=torch.Generator().manual_seed(4))
    text = CalibrationText(tokens, ("random",))
    return calibrate(source, tmp_path_factory.mktemp("stats") / "calib", CalibrateConfig(context=16), text, threads=1)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("sparse")
    return {name: open_checkpoint(tiny_sparse_model(name, folder / name)) for name in SPARSE}


def apart(found: Checkpoint, wanted: Checkpoint, name: str) -> float:
    expected = wanted.read_float(name, torch.float64)
    return float((found.read_float(name, torch.float64) - expected).abs().max() / expected.abs().max())


def check_comes_back(rotated: Checkpoint, source: Checkpoint, folder: Path) -> Checkpoint:
    assert max(apart(rotated, source, name) for name in source.names()) > GONE
    found = undo(rotated, folder / "undone", threads=1)
    assert sorted(found.names()) == sorted(source.names())
    assert max(apart(found, source, name) for name in source.names()) < STORED_F32
    assert found.numbers == source.numbers
    assert found.rotations == []
    assert found.manifest.get("target") == source.manifest.get("target")
    return found


def check_comes_back_in_float64(view: RotatedView, source: Checkpoint) -> None:
    """What the stage does to every tensor, with nothing stored as F32 in between."""
    with Workers(1) as workers:
        gains = {name: source.read(name) for name in Rotator(source, view.read_rotations(), workers).folded}
        rotator = Unrotator(view, gains, workers, dtype=torch.float64)
        for name in source.names():
            expected = source.read_float(name, torch.float64)
            worst = (rotator.tensor(name) - expected).abs().max() / expected.abs().max()
            assert float(worst) < IN_FLOAT64, name


@pytest.mark.parametrize("what", CONFIGS)
def test_every_weight_comes_back(what: str, source: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    seen = stats if what == "dfrot" else None
    rotated = rotate(source, tmp_path / "rotated", CONFIGS[what], seen, threads=1)
    found = check_comes_back(rotated, source, tmp_path)
    check_comes_back_in_float64(RotatedView(source, CONFIGS[what], seen, rotated.read_rotations()), source)
    assert sorted(path.suffix for path in found.root.iterdir()).count(".safetensors") == len(found.shards())
    assert plan_undo(rotated)["undoes"] == [rotation.site for rotation in rotated.rotations]
    # It is a model like any other: it can be rotated again.
    again = rotate(open_checkpoint(found.root), tmp_path / "again", RotateConfig(residual=False), threads=1)
    assert [one.site for one in again.rotations] == ["heads"]


@pytest.mark.parametrize(
    ("name", "config"), [*SPARSE.items(), ("deepseek2", DENSE), ("deepseek3", DENSE), ("qwen3moe", DENSE)]
)
def test_experts_and_latents_come_back(
    name: str, config: RotateConfig, sparse: dict[str, Checkpoint], tmp_path: Path
) -> None:
    source = sparse[name]
    rotated = rotate(source, tmp_path / "rotated", config, threads=1)
    sites = {rotation.site for rotation in rotated.rotations}
    latent = {"kv_latent", "nope"} if "deepseek" in name else set()
    assert sites >= {"residual", "heads"} | latent | ({"hidden_experts"} if config.hidden != "none" else set())
    check_comes_back(rotated, source, tmp_path)
    check_comes_back_in_float64(RotatedView(source, config, rotations=rotated.read_rotations()), source)


def test_a_head_that_was_trained_meanwhile_stays_untied(source: Checkpoint, tmp_path: Path) -> None:
    rotated = rotate(source, tmp_path / "rotated", RotateConfig(), threads=1)
    read = rotated.read
    rotated.read = lambda name: read(name) * (1.01 if name == "output.weight" else 1)  # type: ignore[method-assign]
    found = undo(rotated, tmp_path / "undone", threads=1)
    assert not found.numbers.tied
    assert torch.allclose(found.read("output.weight"), 1.01 * source.read("token_embd.weight"), atol=1e-4)


def test_what_cannot_be_undone_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    rotated = rotate(source, tmp_path / "rotated", RotateConfig(), threads=1)
    quantized = quantize(rotated, tmp_path / "quantized", QuantizeConfig("Q8_0"))
    for model, reason in ((source, "nothing to undo"), (quantized, "is quantized")):
        with pytest.raises(RondelError, match=reason):
            undo(model, tmp_path / "out")
    forgetful = Checkpoint(rotated.root, {key: value for key, value in rotated.manifest.items() if key != "folded"})
    with pytest.raises(RondelError, match="tells nothing of its norms' gains"):
        undo(forgetful, tmp_path / "out")
    other = rotate(
        open_checkpoint(tiny_model("qwen2", tmp_path / "hf", tied=True, layers=1, width=64, hidden=64, seed=1)),
        tmp_path / "other",
        RotateConfig(),
        threads=1,
    )
    shutil.copyfile(other.root / f"{GAINS}.safetensors", rotated.root / f"{GAINS}.safetensors")
    with pytest.raises(RondelError, match="is not the gain"):
        undo(rotated, tmp_path / "out")
    assert not (tmp_path / "out").exists()
