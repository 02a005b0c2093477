"""Do models rotated by a matrix compute the same function, and is the search the same every time?"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.folder import sha256_of
from rondel.converters.rotation import MATRICES, Rotation
from rondel.converters.stats import Stats, open_stats
from rondel.quant import optrot, procrustes, rotation_search
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.hadamard import pack_signs, unpack_signs
from rondel.quant.orthogonal import dense_matrix
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.reference import reference_logits
from rondel.quant.rotate import RotateConfig, plan, rotate
from rondel.quant.rotated_view import RotatedView
from tests.tiny import tiny_model

EXACT = 1e-10  # of the largest logit, in float64
STORED_F32 = 2e-6  # what storing weights as F32 costs
ORTHOGONAL = 1e-12
TOKENS = torch.randint(0, 288, (24,), generator=torch.Generator().manual_seed(5))
KINDS = ("orthogonal", "optrot", "dfrot")
FEW = 3  # steps of the optimizers: any rotation must keep the function


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optrot, "STEPS", FEW)
    monkeypatch.setattr(procrustes, "ALTERNATIONS", FEW)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source") / "model"
    return open_checkpoint(tiny_model("qwen2", folder, tied=True, heads=6, kv_heads=2, width=96))


@pytest.fixture(scope="module")
def stats(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    windows = torch.randint(0, 288, (6, 32), generator=torch.Generator().manual_seed(4))
    text = CalibrationText(windows, ("random",))
    return calibrate(source, tmp_path_factory.mktemp("stats") / "calib", CalibrateConfig(context=32), text)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_stays(kind: str, source: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    config = RotateConfig(rotate="always", kind=kind)
    expected = reference_logits(source, TOKENS)
    assert difference(reference_logits(RotatedView(source, config, stats), TOKENS), expected) < EXACT
    rotated = rotate(source, tmp_path / "rotated", config, stats)
    assert difference(reference_logits(rotated, TOKENS), expected) < STORED_F32
    open_stats(tmp_path / "rotated").check_basis(rotated)
    residual, heads = rotated.read_rotations()
    assert (residual.site, residual.kind, residual.block, residual.seed) == ("residual", "orthogonal", 96, 0)
    assert heads.kind == ("orthogonal" if kind == "orthogonal" else "hadamard")
    for rotation in (residual, heads):
        matrix = dense_matrix(rotation)
        assert (matrix.T @ matrix - torch.eye(96, dtype=torch.float64)).abs().max() < ORTHOGONAL
    # What is stored takes the embedding back.
    back = rotated.read_float("token_embd.weight", torch.float64) @ dense_matrix(residual).T
    assert difference(back, source.read_float("token_embd.weight", torch.float64)) < STORED_F32


@pytest.mark.parametrize("kind", ["optrot", "dfrot"])
def test_an_optimized_stream_and_a_hidden_layer_that_turns_online(
    kind: str, source: Checkpoint, stats: Stats, tmp_path: Path
) -> None:
    config = RotateConfig(rotate="always", kind=kind, hidden="full", queries="full", target="rondel")
    rotated = rotate(source, tmp_path / "rotated", config, stats)
    assert difference(reference_logits(rotated, TOKENS), reference_logits(source, TOKENS)) < STORED_F32
    assert [one.online for one in rotated.rotations] == [False, False, True, True]


def test_query_heads_share_the_matrix_of_their_values(source: Checkpoint, tmp_path: Path) -> None:
    rotated = rotate(source, tmp_path / "rotated", RotateConfig(kind="orthogonal", residual=False))
    (heads,) = rotated.read_rotations()
    assert heads.matrix.shape == (2, 16, 16)
    assert heads.size == 96
    value = rotated.read_float("blk.0.attn_v.bias", torch.float64).reshape(2, 16)
    expected = source.read_float("blk.0.attn_v.bias", torch.float64).reshape(2, 1, 16) @ heads.matrix
    assert difference(value, expected[:, 0]) < STORED_F32


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_for_any_threads_and_after_an_interruption(
    kind: str, source: Checkpoint, stats: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RotateConfig(rotate="always", kind=kind, tries=2)
    rotate(source, tmp_path / "one", config, stats, threads=1)
    rotate(source, tmp_path / "two", config, stats, threads=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert f"{MATRICES}.safetensors" in contents(tmp_path / "one")

    def stop(done: int, total: int, what: str) -> None:
        if what == "blk-00001":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rotate(source, tmp_path / "stopped", config, stats, progress=stop)
    monkeypatch.setattr(rotation_search.RotationSearch, "find", None)  # the matrices were kept
    rotate(source, tmp_path / "stopped", config, stats)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "one")


def test_seeds_give_other_matrices(source: Checkpoint, tmp_path: Path) -> None:
    made = [rotate(source, tmp_path / str(seed), RotateConfig(kind="orthogonal", seed=seed)) for seed in (0, 1)]
    hashes = {rotation.sha256 for rotated in made for rotation in rotated.rotations}
    assert len(hashes) == 4
    assert [rotation.seed for rotation in made[1].rotations] == [1, 1]


def test_the_objective_falls_and_is_told(source: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    for kind in ("optrot", "dfrot"):
        rotated = rotate(source, tmp_path / kind, RotateConfig(rotate="always", kind=kind), stats)
        told = rotated.manifest["rotation_search"]["objective"]
        assert told["after"] < told["before"]
        assert 0 < told["steps"] <= FEW


@pytest.mark.parametrize("measured", [False, True])
def test_the_best_of_several_seeds_is_taken(measured: bool, source: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    given = stats if measured else None
    rotated = rotate(source, tmp_path / "rotated", RotateConfig(rotate="always", tries=3, seed=5, type="q4_0"), given)
    told = rotated.manifest["rotation_search"]
    scores = {tried["seed"]: tried["score"] for tried in told["tries"]}
    assert list(scores) == [5, 6, 7]
    assert scores[told["seed"]] == min(scores.values())
    assert len(set(scores.values())) == 3
    assert told["measure"] == ("output error at Q4_0" if measured else "fourth powers")
    alone = rotate(source, tmp_path / "alone", RotateConfig(rotate="always", seed=told["seed"]), given)
    assert alone.rotations == rotated.rotations
    assert torch.equal(alone.read("blk.0.ffn_up.weight"), rotated.read("blk.0.ffn_up.weight"))


def test_fewer_outliers_win(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed that leaves one channel alone, signs apart, must lose against one that spreads it."""
    plain = rotation_search.RotationSearch._start

    def spoiled(self: Any, seed: int) -> list[Rotation]:
        found = plain(self, seed)
        return [dataclasses.replace(one, block=1) for one in found] if seed == 0 else found

    plain_read, up = source.read, source.read("blk.0.ffn_up.weight")
    up[:, 3] *= 100
    monkeypatch.setattr(source, "read", lambda name: up if name == "blk.0.ffn_up.weight" else plain_read(name))
    monkeypatch.setattr(rotation_search.RotationSearch, "_start", spoiled)
    rotated = rotate(source, tmp_path / "rotated", RotateConfig(tries=2))
    assert rotated.manifest["rotation_search"]["seed"] == 1


def test_later_stages_keep_the_matrices(source: Checkpoint, tmp_path: Path) -> None:
    rotated = rotate(source, tmp_path / "rotated", RotateConfig(kind="orthogonal"))
    made = quantize(rotated, tmp_path / "quantized", QuantizeConfig("Q8_0"))
    again = open_checkpoint(tmp_path / "quantized")
    assert [one.sha256 for one in made.rotations] == [one.sha256 for one in rotated.rotations]
    assert torch.equal(again.read_rotations()[0].matrix, rotated.read_rotations()[0].matrix)
    # Other matrices under the same name are noticed.
    other = rotate(source, tmp_path / "other", RotateConfig(kind="orthogonal", seed=1))
    file = f"{MATRICES}.safetensors"
    (tmp_path / "quantized" / file).write_bytes((other.root / file).read_bytes())
    with pytest.raises(RondelError, match=r"rotation\.0 is not the one"):
        open_checkpoint(tmp_path / "quantized").read_rotations()


def test_matrices_of_another_form_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    rotated = rotate(source, tmp_path / "rotated", RotateConfig(kind="orthogonal", heads=False))
    (rotation,) = rotated.read_rotations()
    matrix = rotation.matrix
    for wrong in (matrix.float(), matrix[0], matrix[:, :48, :48].contiguous(), matrix[:0]):
        save_file({"rotation.0": wrong}, rotated.root / f"{MATRICES}.safetensors")
        rotated.manifest["rotations"][0]["sha256"] = sha256_of(wrong)
        with pytest.raises(RondelError, match=r"expected float64 matrices for 1 blocks of 96"):
            rotated.read_rotations()


def test_refusals(source: Checkpoint, stats: Stats) -> None:
    def refused(match: str, given: Stats | None = None, **settings: Any) -> None:
        with pytest.raises(RondelError, match=match):
            plan(source, RotateConfig(**settings), given)

    refused("expected one of hadamard, orthogonal, optrot, dfrot", kind="spin")
    refused("hidden runs online", kind="orthogonal", hidden="full", target="rondel")
    refused("boundary runs online", kind="optrot", keep_tied=True, target="rondel")
    refused("residual stream, which is left out", kind="optrot", residual=False)
    refused("needs text", kind="dfrot")
    refused("--massive", massive="forget")
    refused("--tries 0", tries=0)
    refused("no type 'Q9'", type="Q9")
    windowless = Stats(stats.root, {**stats.manifest, "tensors": dict(stats.manifest["tensors"])})
    del windowless.manifest["tensors"]["windows"]
    refused("needs text", Stats(windowless.root, windowless.manifest), kind="dfrot")
    beside = plan(source, RotateConfig(kind="optrot", hidden="full", target="rondel"))["rotations"]
    assert [one["kind"] for one in beside] == ["orthogonal", "hadamard", "hadamard"]


def test_plan_and_records_tell_the_kind(source: Checkpoint, tmp_path: Path) -> None:
    config = RotateConfig(kind="orthogonal", tries=2, seed=3)
    told = json.loads(json.dumps(plan(source, config)))
    assert [(one["site"], one["kind"], one["seed"]) for one in told["rotations"]] == [
        ("residual", "orthogonal", 3),
        ("heads", "orthogonal", 3),
    ]
    assert [one["block"] for one in told["rotations"]] == [96, 16]
    assert told["tries"] == 2
    record = rotate(source, tmp_path / "rotated", config).manifest["rotations"][0]
    assert (record["kind"], record["signs"], len(record["sha256"])) == ("orthogonal", "", 64)
    assert "matrix" not in record
    with pytest.raises(ValueError, match="kind 'hadamard'"):
        Rotation.from_json({**record, "kind": "hadamard"})
    with pytest.raises(ValueError, match="turns online"):
        Rotation.from_json({**record, "online": True})
    with pytest.raises(ValueError, match="kind 'orthogonal'"):
        Rotation.from_json({**record, "sha256": None})


def test_hadamards_need_no_file_of_their_own(source: Checkpoint, tmp_path: Path) -> None:
    rotated = rotate(source, tmp_path / "rotated", RotateConfig(tries=2))
    assert f"{MATRICES}.safetensors" not in contents(tmp_path / "rotated")
    assert rotated.read_rotations() == rotated.rotations
    signs = unpack_signs(rotated.rotations[0].signs, 96)
    assert pack_signs(signs) == rotated.rotations[0].signs
