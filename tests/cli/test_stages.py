"""The stage commands: what they print where, what they refuse, and that the chain of the README holds together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rondel.cli.main import app, load_command
from rondel.converters.errors import RondelError
from tests.tiny import tiny_model

STAGES = ("calibrate", "rotate", "quantize", "replicate", "export")
EVERY_STAGE = {
    "--output",
    "-o",
    "--quiet",
    "--json",
    "--force",
    "--dry-run",
    "--threads",
    "--seed",
    "--target",
    "--device",
}


def rondel(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    (folder / "text.txt").write_text("once on a time there was the water " * 60, encoding="utf-8")
    return tiny_model("llama", folder / "tiny", tied=True)


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    return model.parent / "text.txt"


@pytest.fixture(scope="module")
def calib(model: Path, text: Path) -> Path:
    out = model.parent / "calib"
    done = rondel("calibrate", model, "--text", text, "-o", out, "--context", 32, "--tokens", 256, "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_takes_the_same_options(stage: str) -> None:
    names = {name for parameter in load_command(stage).params for name in parameter.opts}
    assert names >= EVERY_STAGE


def arguments(stage: str, text: Path) -> list[str | Path]:
    return {"calibrate": ["--text", text, "--context", "32"], "replicate": ["--layer", "1:serial:1"]}.get(stage, [])


@pytest.mark.parametrize("stage", STAGES)
def test_json_is_all_there_is_on_standard_output(stage: str, model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = rondel(stage, model, "-o", out, *arguments(stage, text), "--dry-run", "--json")
    assert planned.exit_code == 0, planned.exception
    assert isinstance(json.loads(planned.stdout), dict)
    assert not out.exists()
    done = rondel(stage, model, "-o", out, *arguments(stage, text), "--json")
    assert json.loads(done.stdout)["command"] == stage
    assert out.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_that_is_none_leaves_no_folder(stage: str, text: Path, tmp_path: Path) -> None:
    done = rondel(stage, tmp_path / "nothing", "-o", tmp_path / "out", *arguments(stage, text))
    assert isinstance(done.exception, RondelError)
    assert "nothing" in str(done.exception)
    assert not any(tmp_path.iterdir())


def test_the_chain_of_the_readme(model: Path, calib: Path, tmp_path: Path) -> None:
    """Statistics of the plain model serve the rotated one: quantize finds what rotate made of them."""
    steps = [
        ["rotate", model, "--stats", calib, "--rotate", "always", "-o", tmp_path / "rotated"],
        ["quantize", tmp_path / "rotated", "--stats", calib, "--type", "Q8_0", "-o", tmp_path / "quantized"],
        [
            "replicate",
            tmp_path / "quantized",
            "--teacher",
            model,
            "--layer",
            "1:serial:1",
            "-o",
            tmp_path / "replicated",
        ],
        ["export", tmp_path / "replicated", "-o", tmp_path / "model.gguf"],
        ["verify", tmp_path / "model.gguf", "--manifest", tmp_path / "replicated"],
        ["run", tmp_path / "model.gguf", "-p", "once", "-n", 4],
    ]
    for step in steps:
        done = rondel(*step, "--quiet")
        assert done.exit_code == 0, (step[0], done.exception)
    told = json.loads(rondel("inspect", tmp_path / "model.gguf", "--json").stdout)
    assert [rotation["site"] for rotation in told["rotations"]] == ["residual", "heads"]
    assert told["replication"]["layer_1"]["type"] == "serial"
    assert told["keys"]["rondel.calibration.tokens"] == 256


def test_statistics_of_another_model_are_refused(calib: Path, tmp_path: Path) -> None:
    other = tiny_model("llama", tmp_path / "other", seed=1)
    done = rondel("rotate", other, "--stats", calib, "-o", tmp_path / "rotated")
    assert isinstance(done.exception, RondelError)
    assert not (tmp_path / "rotated").exists()


def test_an_imatrix_serves_as_statistics(model: Path, text: Path, tmp_path: Path) -> None:
    imatrix = tmp_path / "imatrix.gguf"
    done = rondel("calibrate", model, "--text", text, "--context", 32, "-o", tmp_path / "calib", "--imatrix", imatrix)
    assert done.exit_code == 0, done.exception
    by_stats = rondel(
        "quantize", model, "--stats", tmp_path / "calib", "--type", "Q4_0", "-o", tmp_path / "a", "--json"
    )
    by_imatrix = rondel("quantize", model, "--imatrix", imatrix, "--type", "Q4_0", "-o", tmp_path / "b", "--json")
    assert json.loads(by_stats.stdout)["tensors"] == json.loads(by_imatrix.stdout)["tensors"]
    both = rondel("quantize", model, "--stats", tmp_path / "calib", "--imatrix", imatrix, "-o", tmp_path / "c")
    assert isinstance(both.exception, RondelError)


def test_a_fallback_is_told(model: Path, tmp_path: Path) -> None:
    """Rows of 64 and 96 columns fit no K-type."""
    done = rondel("quantize", model, "--type", "Q4_K", "-o", tmp_path / "out")
    assert "blk.0.ffn_down.weight: Q5_0 instead of" in done.stderr
    assert "Q4_K" not in done.stdout


@pytest.mark.parametrize("override", ["ffn_down", "=Q4_K", "ffn_down=", "nowhere=Q8_0", "ffn_down=Q9"])
def test_overrides_that_mean_nothing(model: Path, tmp_path: Path, override: str) -> None:
    done = rondel("quantize", model, "--tensor", override, "-o", tmp_path / "out")
    assert isinstance(done.exception, RondelError)
    assert not any(tmp_path.iterdir())


def test_bench_measures(model: Path, tmp_path: Path) -> None:
    rondel("export", model, "-o", tmp_path / "model.gguf", "--quiet")
    done = rondel("bench", tmp_path / "model.gguf", "--prompt", 16, "--generate", 4, "--repeat", 1, "--json", "-t", 1)
    told = json.loads(done.stdout)
    speeds = ("prefill_tokens_per_second", "decode_tokens_per_second", "gigabytes_per_second", "bandwidth_share")
    assert all(told[speed] > 0 for speed in speeds)
    assert told["bytes_per_token"] > 0
    assert told["threads"] == 1


def test_rotate_tells_its_choice_and_is_undone(model: Path, calib: Path, tmp_path: Path) -> None:
    auto = ["rotate", model, "--stats", calib, "--type", "Q4_0"]
    planned = json.loads(rondel(*auto, "-o", tmp_path / "out", "--dry-run", "--json").stdout)["choice"]
    assert planned["bytes"]["rotated"] > planned["bytes"]["now"]
    done = rondel(*auto, "-o", tmp_path / "out", "--json")
    assert json.loads(done.stdout)["choice"] == planned
    told = rondel(*auto, "-o", tmp_path / "out").stdout
    assert "rotate and scale dB" in told
    assert f"then quantize with --method {planned['method']}" in told
    assert isinstance(rondel("rotate", model, "--undo", "-o", tmp_path / "undone").exception, RondelError)
    assert "rotated as asked: without statistics" in rondel("rotate", model, "-o", tmp_path / "rotated").stdout
    for other in (["--rotate", "always"], ["--stats", calib]):
        assert rondel("rotate", tmp_path / "rotated", "--undo", *other, "-o", tmp_path / "undone").exit_code == 2
    assert json.loads(
        rondel("rotate", tmp_path / "rotated", "--undo", "-o", tmp_path / "x", "--dry-run", "--json").stdout
    )["ties_head"]
    assert rondel("rotate", tmp_path / "rotated", "--undo", "-o", tmp_path / "undone", "--quiet").exit_code == 0


def test_bench_reads_no_more_with_parallel_copies(model: Path, tmp_path: Path) -> None:
    def bytes_per_token(folder: Path) -> int:
        file = tmp_path / f"{folder.name}.gguf"
        for step in (
            ["export", folder, "--type", "F16", "-o", file, "--quiet"],
            ["bench", file, "--prompt", 4, "--generate", 2, "--repeat", 1, "--json", "-t", 1],
        ):
            done = rondel(*step)
            assert done.exit_code == 0, done.exception
        return int(json.loads(done.stdout)["bytes_per_token"])

    read = [bytes_per_token(model)]
    for layer in ("1:parallel:1", "1:parallel:2", "1:parallel:7", "1:serial:1"):
        out = tmp_path / layer.replace(":", "-")
        assert rondel("replicate", model, "--layer", layer, "-o", out, "--quiet").exit_code == 0
        read.append(bytes_per_token(out))
    assert read[1:4] == read[:1] * 3
    assert read[4] > read[0]  # a serial copy goes through the layer again
