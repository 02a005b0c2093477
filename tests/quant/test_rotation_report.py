"""Does the report of rotate tell of channels what statistics and weights say, for what was done and what was not?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.stats import Stats
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.output_error import digits
from rondel.quant.rotate import RotateConfig, rotate
from rondel.quant.rotation_report import STREAM, ranges, report_of
from tests.quant.turned import principal_axes, turned
from tests.tiny import tiny_model

SAME = 1e-4  # relative: six digits of float32 sums, turned in float64 or stored as F32 in between
SPIKE = 900.0  # a massive activation: the others are about 1
GONE = 50.0  # how many times the largest channel must come closer to the median one
ALWAYS = RotateConfig(rotate="always", type="Q4_0")
TURNED_SITES = (STREAM, "attn_in", "ffn_in", "heads", "output_in")
PARTS = {"least", "low", "median", "high", "most"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tied model; the token 7 has a massive activation in channel 5."""
    made = open_checkpoint(tiny_model("llama", tmp_path_factory.mktemp("source") / "hf", tied=True))
    read = made.read

    def spiked(name: str) -> torch.Tensor:
        tensor = read(name)
        if name == "token_embd.weight":
            tensor = tensor.clone()
            tensor[7, 5] = SPIKE
        return tensor

    made.read = spiked  # type: ignore[method-assign]
    return made


@pytest.fixture(scope="module")
def stats(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    tokens = torch.randint(8, source.numbers.vocabulary, (8, 32), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = 7
    text = CalibrationText(tokens, ("random",))
    return calibrate(source, tmp_path_factory.mktemp("s") / "calib", CalibrateConfig(context=32), text, threads=1)


def report(
    source: Checkpoint, out: Path, config: RotateConfig, stats: Stats | None
) -> tuple[Checkpoint, dict[str, Any]]:
    made = rotate(source, out, config, stats, threads=1)
    return made, report_of(source, made, config, stats, threads=1)


def layer_of(told: dict[str, Any], part: str, name: str, layer: int | None) -> dict[str, Any]:
    found = next(one for one in told[part] if one["name"] == name)
    return next(one for one in found["layers"] if one["layer"] == layer)


def test_ranges_are_order_statistics() -> None:
    assert ranges(torch.arange(101.0).flip(0)) == {"least": 0, "low": 25, "median": 50, "high": 75, "most": 100}


def test_channels_are_what_the_model_showed(source: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    made, told = report(source, tmp_path / "out", ALWAYS, stats)
    assert told["turned"]
    assert told["calibration_tokens"] == 256
    seen = stats.diagonal(1, "attn_in").sqrt()
    assert layer_of(told, "sites", "attn_in", 1)["before"] == ranges(seen)
    bare = seen.double() / source.read_float("blk.1.attn_norm.weight", torch.float64).abs()
    assert layer_of(told, "sites", STREAM, 1)["before"] == pytest.approx(ranges(bare), rel=SAME)
    # The gain is folded: what the matrices read is the stream.
    assert layer_of(told, "sites", STREAM, 1)["after"] == layer_of(told, "sites", "attn_in", 1)["after"]
    ends = source.read_float("output_norm.weight", torch.float64).abs()
    at_head = ranges(stats.diagonal(None, "output_in").sqrt().double() / ends)
    assert layer_of(told, "sites", STREAM, None)["before"] == pytest.approx(at_head, rel=SAME)
    for model, basis in ((source, "before"), (made, "after")):
        largest = float(model.read("blk.1.ffn_up.weight").abs().max())
        assert layer_of(told, "tensors", "ffn_up", 1)[basis]["most"] == digits(largest)
    assert layer_of(told, "tensors", "output", None)["before"] is None  # tied: it is the embedding
    assert layer_of(told, "tensors", "token_embd", None)["before"]["most"] == SPIKE
    assert [one["site"] for one in told["rotations"]] == ["residual", "heads"]
    layers = [one["layer"] for one in told["sites"][0]["layers"]]
    assert (told["sites"][0]["name"], layers) == (STREAM, [0, 1, None])
    assert all(set(layer["before"]) == PARTS for site in told["sites"] for layer in site["layers"])


def test_massive_activations_are_told(source: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    _, told = report(source, tmp_path / "out", ALWAYS, stats)
    assert [layer["layer"] for layer in told["stream"]] == [0, 1]
    for layer in told["stream"]:
        first = layer["massive_activations"][0]
        assert (first["position"], first["channel"]) == (0, 5)
        assert abs(first["value"]) > layer["massive_from"] > 0
        assert layer["positions_99_9"][0]["position"] == 0


def test_what_was_not_done_is_told_as_it_would_have_been(source: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    auto = replace(ALWAYS, rotate="auto")
    kept, told = report(source, tmp_path / "auto", auto, stats)
    _, forced = report(source, tmp_path / "always", ALWAYS, stats)
    assert not kept.rotations
    assert not told["turned"]
    assert told["choice"] == kept.manifest["rotation_choice"]
    assert told["rotations"] == forced["rotations"]
    for part in ("sites", "tensors"):
        assert [one["name"] for one in told[part]] == [one["name"] for one in forced[part]]
        for mine, theirs in zip(told[part], forced[part], strict=True):
            for layer, other in zip(mine["layers"], theirs["layers"], strict=True):
                assert layer["before"] == other["before"]
                assert layer["after"] == pytest.approx(other["after"], rel=SAME), (mine["name"], layer["layer"])


def test_online_rotations_count_as_well(source: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    config = replace(ALWAYS, keep_tied=True, hidden="full", target="rondel")
    _, told = report(source, tmp_path / "out", config, stats)
    hidden = layer_of(told, "sites", "hidden", 0)
    assert hidden["before"] != hidden["after"]
    # The tied head keeps its basis, and the gain in front of it stays.
    head = layer_of(told, "sites", STREAM, None)
    assert head["before"] == head["after"]
    assert layer_of(told, "tensors", "token_embd", None)["after"]["most"] == SPIKE


def test_outliers_of_principal_axes_are_gone(source: Checkpoint, tmp_path: Path) -> None:
    """The largest axis is that of the massive activation."""
    poor = turned(source, principal_axes(source), tmp_path / "poor")
    _, told = report(poor, tmp_path / "out", replace(ALWAYS, heads=False), None)
    peak = next(one["peak"] for one in told["tensors"] if one["name"] == "token_embd")
    assert peak["before"] > GONE * peak["after"]


@pytest.mark.parametrize(
    ("config", "calibrated", "sentences"),
    [
        (RotateConfig(), False, ["give --stats"]),
        (ALWAYS, True, ["--rotate auto measures"]),
        (RotateConfig(rotate="never"), True, ["--rotate auto shows"]),
        (RotateConfig(rotate="never"), False, ["--rotate auto shows", "give --stats"]),
    ],
)
def test_it_says_what_to_give(
    config: RotateConfig,
    calibrated: bool,
    sentences: list[str],
    source: Checkpoint,
    stats: Stats,
    tmp_path: Path,
) -> None:
    _, told = report(source, tmp_path / "out", config, stats if calibrated else None)
    assert len(told["missing"]) == len(sentences)
    assert all(wanted in sentence for wanted, sentence in zip(sentences, told["missing"], strict=True))
    assert bool(told["sites"]) == calibrated
    assert bool(told["stream"]) == calibrated
    assert told["tensors"]
    if config.rotate == "never":
        assert told["rotations"] == []
        assert all(layer["after"] is None for one in told["tensors"] for layer in one["layers"])


def test_statistics_of_old_say_nothing_of_massive_activations(source: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    old = Stats(stats.root, {**stats.manifest, "residual": {}})
    _, told = report(source, tmp_path / "out", ALWAYS, old)
    assert any("run rondel calibrate again" in sentence for sentence in told["missing"])
