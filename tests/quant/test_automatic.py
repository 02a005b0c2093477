"""The method auto, and its trials: measured in the model's own coordinates, with the encoder of each method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.stats import Stats
from rondel.native.formats import encode
from rondel.quant import automatic
from rondel.quant.automatic import candidates, decide, sampled_layers
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.importance import Importance, importance_of
from rondel.quant.methods import method_named
from rondel.quant.quantize import QuantizeConfig, plan, quantize
from rondel.quant.trial import Rounding, Trial
from rondel.quant.workers import Workers
from tests.tiny import tiny_model

HALVES = 1e-6  # relative squared error of weights kept as float16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    sizes = {"width": 256, "hidden": 256, "heads": 4, "kv_heads": 2, "layers": 1, "context": 64}
    return open_checkpoint(tiny_model("qwen2", tmp_path_factory.mktemp("model") / "hf", **sizes))


@pytest.fixture(scope="module")
def stats(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    windows = torch.randint(0, 288, (16, 32), generator=torch.Generator().manual_seed(2))
    config = CalibrateConfig(tokens=512, context=32)
    return calibrate(model, tmp_path_factory.mktemp("stats") / "calib", config, CalibrationText(windows, ("text",)))


def test_the_simplest_of_nearly_equals_is_taken() -> None:
    assert decide({"imatrix": 0.1, "gptq": 0.0999, "awq+gptq": 0.0995}) == "imatrix"
    assert decide({"imatrix": 0.1, "gptq": 0.05, "awq+gptq": 0.0498}) == "gptq"
    assert decide({"imatrix": 0.1, "gptq": 0.05, "awq+gptq": 0.04}) == "awq+gptq"
    assert (sampled_layers(1), sampled_layers(2), sampled_layers(9)) == ([0], [0, 1], [0, 4, 8])


def test_candidates_are_what_the_statistics_allow(model: Checkpoint, stats: Stats) -> None:
    names = [method.name for method in candidates(model, importance_of(stats), feedback=True)]
    assert names[:3] == ["rtn", "imatrix", "gptq"]
    assert set(names[3:]) == {"awq+imatrix", "awq+gptq", "smoothquant+imatrix", "smoothquant+gptq"}
    fewer = candidates(model, Importance(matrices={}), feedback=False)
    assert [method.name for method in fewer] == ["rtn", "imatrix", "awq+imatrix"]


def test_writes_what_its_choice_writes_and_tells_why(
    model: Checkpoint, stats: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig("Q2_K", method="auto")
    assert plan(model, config, stats)["config"]["method"] == "auto"

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("blk.0."):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "auto", config, stats, threads=1, progress=stop)
    monkeypatch.setattr(automatic, "choose", None)  # the interrupted run's choice is kept
    made = quantize(model, tmp_path / "auto", config, stats, threads=1)
    told = made.manifest["quantization"]["auto"]
    assert told["chosen"] == decide(told["errors"])
    assert told["layers"] == [0]
    assert told["errors"]["gptq"] < told["errors"]["imatrix"] < told["errors"]["rtn"]
    assert ("least" in told["reason"]) == (told["chosen"] == min(told["errors"], key=lambda name: told["errors"][name]))
    alone = quantize(model, tmp_path / "alone", QuantizeConfig("Q2_K", method=told["chosen"]), stats, threads=1)
    for name in made.names():
        assert made.info(name).sha256 == alone.info(name).sha256, name


def test_without_statistics_there_is_nothing_to_measure(model: Checkpoint, tmp_path: Path) -> None:
    made = quantize(model, tmp_path / "out", QuantizeConfig("Q2_K", method="auto"), threads=1)
    assert made.manifest["quantization"]["auto"] == {"chosen": "imatrix", "reason": "there are no statistics"}


def test_trials_measure_in_the_models_own_coordinates(model: Checkpoint, stats: Stats) -> None:
    moment = stats.second_moment(0, "ffn_in")
    assert moment is not None
    trial = Trial(model, (0, "ffn_in"), moment)
    scale = torch.exp(torch.randn(256, generator=torch.Generator().manual_seed(0)))

    def rounding(format: str, *, feedback: bool = False) -> Rounding:
        return Rounding(dict.fromkeys(trial.names, format), lambda _: encode, weighted=True, feedback=feedback)

    with Workers(1) as workers:
        assert max(trial.errors(rounding("F16"), scale, workers)) < HALVES
        for tried in (None, scale):
            plain = trial.errors(rounding("Q2_K"), tried, workers)
            fed_back = trial.errors(rounding("Q2_K", feedback=True), tried, workers)
            assert all(less < more for less, more in zip(fed_back, plain, strict=True))


def test_auto_is_no_part_of_another_method() -> None:
    assert method_named("AUTO").name == "auto"
    with pytest.raises(Exception, match=r"--method awq\+auto: expected one of rtn, imatrix"):
        method_named("awq+auto")
