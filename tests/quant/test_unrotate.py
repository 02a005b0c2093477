"""Does a rotated model come back to the weights that it was made from, for every kind and placement?"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.rotation import GAINS
from rondel.quant import optrot
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.rotate import RotateConfig, rotate
from rondel.quant.unrotate import plan_undo, undo
from tests.tiny import tiny_model

STORED_F32 = 1e-6  # of a tensor's largest weight: two roundings to F32, and a sum over the channels
GONE = 1e-2  # what a rotation must at least have changed
CONFIGS = {
    "hadamard": RotateConfig(),
    "orthogonal": RotateConfig(kind="orthogonal"),
    "optrot": RotateConfig(kind="optrot"),
    "heads": RotateConfig(residual=False),
    "online": RotateConfig(keep_tied=True, queries="full", hidden="full", target="rondel"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source") / "hf"
    return open_checkpoint(tiny_model("qwen2", folder, tied=True, layers=1, width=64, hidden=64))


def apart(found: Checkpoint, wanted: Checkpoint, name: str) -> float:
    expected = wanted.read_float(name, torch.float64)
    return float((found.read_float(name, torch.float64) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("what", CONFIGS)
def test_every_weight_comes_back(
    what: str, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optrot, "STEPS", 2)
    rotated = rotate(source, tmp_path / "rotated", CONFIGS[what], threads=1)
    assert max(apart(rotated, source, name) for name in source.names()) > GONE
    found = undo(rotated, tmp_path / "undone", threads=1)
    assert found.names() == source.names()
    assert max(apart(found, source, name) for name in source.names()) < STORED_F32
    assert found.numbers == source.numbers
    assert found.rotations == []
    assert found.manifest.get("target") == source.manifest.get("target")
    assert sorted(path.suffix for path in found.root.iterdir()).count(".safetensors") == len(found.shards())
    assert plan_undo(rotated)["undoes"] == [rotation.site for rotation in rotated.rotations]
    # It is a model like any other: it can be rotated again.
    again = rotate(open_checkpoint(found.root), tmp_path / "again", RotateConfig(residual=False), threads=1)
    assert [one.site for one in again.rotations] == ["heads"]


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
