"""Budgets: files of exactly the planned size, never above what was allowed, better than the mixture of that size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.export import ExportConfig, export
from rondel.converters.imatrix import read_imatrix
from rondel.converters.stats import Stats
from rondel.native.formats import format_bytes
from rondel.quant.budget import Account, worth_trying
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.candidates import feedback_share
from rondel.quant.importance import open_imatrix
from rondel.quant.quantize import QuantizeConfig, plan, quantize
from tests.tiny import tiny_model

CONTEXT = 32
BLOCK = 2048  # bytes: a step between two formats of the smallest matrix below, and more
LIGHT = ("IQ2_XXS", "Q2_K", "Q3_K", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0", "F16")  # encoded in little time


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rondel.quant.candidates.WIDE", LIGHT)
    monkeypatch.setattr("rondel.quant.candidates.SAMPLE_ROWS", 16)


def made(folder: Path, **more: Any) -> tuple[Checkpoint, Stats]:
    ids = torch.randint(0, 288, (8, CONTEXT), generator=torch.Generator().manual_seed(4))
    source = open_checkpoint(tiny_model("qwen3", folder / "hf", dtype="bfloat16", **more))
    return source, calibrate(source, folder / "calib", CalibrateConfig(context=CONTEXT), CalibrationText(ids, ("a",)))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Stats]:
    return made(tmp_path_factory.mktemp("wide"), width=256, hidden=512, heads=4, kv_heads=1, head_dim=64)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Stats]:
    """A tied head, and rows of 64 and of 172 columns: blocks of 32 fit some, none fits the others."""
    return made(tmp_path_factory.mktemp("narrow"), width=64, hidden=172, tied=True)


def bits(planned: dict[str, Any]) -> float:
    return float(planned["bits_per_weight"])


@pytest.mark.parametrize("asked", [{"like": "Q3_K_M"}, {"size": 700_000}, {"bpw": 5.2}])
def test_the_file_has_the_planned_size(wide: tuple[Checkpoint, Stats], tmp_path: Path, asked: dict[str, Any]) -> None:
    source, stats = wide
    config = QuantizeConfig(method="imatrix", **asked)
    planned = json.loads(json.dumps(plan(source, config, stats)))
    checkpoint = quantize(source, tmp_path / "out", config, stats)
    (file,) = export(checkpoint, tmp_path / "model.gguf", ExportConfig())
    budget = planned["budget"]
    assert file.stat().st_size == budget["file_bytes"]
    assert 0 <= budget["most_bytes"] - budget["bytes"] < BLOCK
    assert budget["bytes"] == (planned["bytes"] if "bpw" in asked else budget["file_bytes"])
    assert checkpoint.manifest["quantization"]["budget"] == budget
    for line in planned["tensors"]:
        assert checkpoint.info(line["name"]).format == line["format"]
        told = checkpoint.manifest["quantization"]["tensors"].get(line["name"])
        assert told is None or told["cost"] == line["cost"] > 0
    assert budget["expected_kl"] == pytest.approx(sum(line.get("cost", 0) for line in planned["tensors"]), rel=1e-4)
    assert len({line["format"] for line in planned["tensors"] if "cost" in line}) > 1
    if "bpw" in asked:
        assert 5.1 < bits(planned) <= 5.2


def test_like_is_no_larger_than_the_mixture(wide: tuple[Checkpoint, Stats], tmp_path: Path) -> None:
    """Even against a file without the keys of rondel's own."""
    source, stats = wide
    mixture = quantize(source, tmp_path / "mixture", QuantizeConfig("Q2_K", method="imatrix"), stats)
    (file,) = export(mixture, tmp_path / "mixture.gguf", ExportConfig())
    budget = plan(source, QuantizeConfig(like="q2_k", method="imatrix"), stats)["budget"]
    assert budget["file_bytes"] <= budget["most_bytes"] < file.stat().st_size


def test_overrides_hold(wide: tuple[Checkpoint, Stats]) -> None:
    source, stats = wide
    config = QuantizeConfig(bpw=6.0, tensors=(("ffn_down", "Q8_0"),), embedding_type="Q4_0", method="imatrix")
    planned = plan(source, config, stats)
    found = {line["name"]: line["format"] for line in planned["tensors"]}
    assert found["token_embd.weight"] == "Q4_0"
    assert {found[f"blk.{layer}.ffn_down.weight"] for layer in range(2)} == {"Q8_0"}
    assert bits(planned) <= 6.0


def test_more_bits_are_expected_to_lose_less(wide: tuple[Checkpoint, Stats]) -> None:
    source, stats = wide
    plans = [plan(source, QuantizeConfig(bpw=bpw, method="imatrix"), stats) for bpw in (3.0, 4.0, 6.0, 40.0)]
    losses = [planned["budget"]["expected_kl"] for planned in plans]
    assert losses == sorted(losses, reverse=True)
    assert {line["format"] for line in plans[-1]["tensors"]} == {"F16", "F32"}


def test_feedback_counts_where_inputs_are_alike(wide: tuple[Checkpoint, Stats], tmp_path: Path) -> None:
    """Matrices of one site share what feedback leaves of their costs; the file is as large as planned."""
    source, stats = wide
    plain, fed = (plan(source, QuantizeConfig(bpw=4.0, method=method), stats) for method in ("imatrix", "gptq"))
    assert fed["budget"]["expected_kl"] < plain["budget"]["expected_kl"]
    shares = {name: feedback_share(source, stats, f"blk.0.{name}.weight") for name in ("attn_q", "attn_v", "ffn_down")}
    assert shares["attn_q"] == shares["attn_v"] != shares["ffn_down"]
    assert all(0 < share < 1 for share in shares.values())
    assert feedback_share(source, stats, "token_embd.weight") == 1
    checkpoint = quantize(source, tmp_path / "out", QuantizeConfig(bpw=4.0), stats)
    (file,) = export(checkpoint, tmp_path / "model.gguf", ExportConfig())
    assert file.stat().st_size == fed["budget"]["file_bytes"]


def test_narrow_rows(narrow: tuple[Checkpoint, Stats], tmp_path: Path) -> None:
    source, stats = narrow
    config = QuantizeConfig(bpw=9.0, method="imatrix")
    checkpoint = quantize(source, tmp_path / "out", config, stats)
    (file,) = export(checkpoint, tmp_path / "model.gguf", ExportConfig())
    assert file.stat().st_size == plan(source, config, stats)["budget"]["file_bytes"]
    assert "output.weight" not in checkpoint
    assert checkpoint.manifest["quantization"]["tensors"]["token_embd.weight"]["weighted"]
    assert checkpoint.info("blk.0.ffn_down.weight").format == "F16"
    assert format_bytes(checkpoint.info("blk.0.attn_q.weight").format, 1, 32) < 64
    with pytest.raises(RondelError, match=r"--bpw 3: the smallest formats that this model fits take \d\.\d+ bits"):
        plan(source, QuantizeConfig(bpw=3.0, method="imatrix"), stats)


def test_threads_change_nothing_and_a_stopped_run_goes_on(
    wide: tuple[Checkpoint, Stats], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, stats = wide
    config = QuantizeConfig(size=600_000, method="imatrix")
    first = quantize(source, tmp_path / "first", config, stats, threads=1)

    def stop(done: int, total: int, what: str) -> None:
        if what not in ("sensitivity", "candidates") and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "second", config, stats, threads=3, progress=stop)
    monkeypatch.setattr("rondel.quant.quantize.spread", None)  # what was chosen is in the journal
    second = quantize(source, tmp_path / "second", config, stats, threads=3)
    files = sorted(path.name for path in first.root.iterdir())
    assert files == sorted(path.name for path in second.root.iterdir())
    assert all((first.root / name).read_bytes() == (second.root / name).read_bytes() for name in files)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"bpw": 2.0, "like": "Q2_K"}, "--bpw and --like: each says how large"),
        ({"bpw": float("nan")}, "--bpw nan: expected a positive number"),
        ({"size": -5}, "--size -5: expected a positive number of bytes"),
        ({"like": "U4"}, "--like U4-128: expected one of llama.cpp's mixtures"),
        ({"like": "Q9"}, "there is no type 'Q9'"),
        ({"bpw": 2.0, "type": "Q2_K"}, "--bpw 2: chooses the types itself; leave out --type Q2_K"),
        ({"bpw": 2.0, "pure": True}, "leave out --pure"),
        ({"size": 5000}, r"--size 5000: the smallest file that this model fits has \d+ bytes"),
        ({"bpw": 0.5}, r"--bpw 0.5: the smallest formats that this model fits take 2\.\d+ bits a weight"),
    ],
)
def test_refusals(wide: tuple[Checkpoint, Stats], asked: dict[str, Any], sentence: str) -> None:
    source, stats = wide
    with pytest.raises(RondelError, match=sentence):
        plan(source, QuantizeConfig(method="imatrix", **asked), stats)


def test_the_smallest_size_is_possible(wide: tuple[Checkpoint, Stats]) -> None:
    source, stats = wide
    with pytest.raises(RondelError) as refused:
        plan(source, QuantizeConfig(size=5000, method="imatrix"), stats)
    least = int(str(refused.value).split()[-2])
    assert plan(source, QuantizeConfig(size=least, method="imatrix"), stats)["budget"]["file_bytes"] == least


def test_statistics_need_their_text(wide: tuple[Checkpoint, Stats]) -> None:
    source, stats = wide
    config = QuantizeConfig(bpw=4.0, method="imatrix")
    with pytest.raises(
        RondelError, match=r"--bpw 4: needs statistics with the tokens of their text \(none are given\)"
    ):
        plan(source, config)
    imatrix = open_imatrix(stats.root / "imatrix.gguf")
    assert read_imatrix(stats.root / "imatrix.gguf").values.keys() == imatrix.matrices.keys()
    with pytest.raises(RondelError, match=r"imatrix\.gguf\); run rondel calibrate"):
        plan(source, config, imatrix)


def test_low_formats_are_tried_where_the_budget_needs_them(wide: tuple[Checkpoint, Stats]) -> None:
    shapes = {"a.weight": (64, 256), "b.weight": (512, 64)}
    account = Account(shapes)
    tried = {"a.weight": ("IQ1_S", "Q4_K", "F16"), "b.weight": ("Q4_0", "F16")}
    smallest = account.total({"a.weight": "IQ1_S", "b.weight": "Q4_0"})
    assert worth_trying(account, tried, smallest) == tried
    generous = account.total({"a.weight": "Q4_K", "b.weight": "Q4_0"})
    assert worth_trying(account, tried, generous) == tried | {"a.weight": ("Q4_K", "F16")}
