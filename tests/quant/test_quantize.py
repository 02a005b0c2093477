"""The stage quantize: formats and bytes as planned, statistics, overrides, refusals, resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.imatrix import write_imatrix
from rondel.converters.output import StageOutput
from rondel.converters.stats import Stats, open_stats
from rondel.native.formats import decode, format_bytes
from rondel.quant import quantize as stage
from rondel.quant.importance import open_imatrix
from rondel.quant.methods import method_named
from rondel.quant.quantize import QuantizeConfig, plan, quantize
from rondel.quant.stage import stage_record
from tests.tiny import tiny_model

WIDTH, HIDDEN = 256, 512
HALF_ROUNDING = 2**-11  # of a weight stored as float16
SAME_ERROR = 1e-4  # the journal keeps six digits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    return open_checkpoint(
        tiny_model("qwen2", folder / "hf", width=WIDTH, hidden=HIDDEN, heads=4, kv_heads=1, layers=3, dtype="bfloat16")
    )


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Rows of 64 and 172 columns, as in ../shared/models/stories260K, and a tied head."""
    folder = tmp_path_factory.mktemp("narrow")
    return open_checkpoint(tiny_model("llama", folder / "hf", width=64, hidden=172, tied=True))


def make_stats(source: Checkpoint, out: Path, **changes: Any) -> Stats:
    """Statistics of a model that nobody ran: lognormal mean squares."""
    generator = np.random.default_rng(3)
    numbers, tensors = source.numbers, {}
    sizes = {"attn_in": numbers.width, "heads": numbers.heads * numbers.head_dim, "ffn_in": numbers.width}
    for layer in range(numbers.layers):
        for site in source.family.sites:
            size = sizes.get(site, numbers.hidden)
            tensors[f"blk.{layer}.{site}.diagonal"] = torch.from_numpy(
                np.exp(2 * generator.standard_normal(size)).astype(np.float32)
            )
    tensors["output_in.diagonal"] = torch.from_numpy(
        np.exp(2 * generator.standard_normal(numbers.width)).astype(np.float32)
    )
    output = StageOutput(out, stage_record("calibrate", QuantizeConfig("none"), source=source))
    output.write("all", tensors)
    manifest = {
        "kind": "stats",
        "family": source.family.name,
        "hyperparameters": numbers.to_json(),
        "rotations": source.manifest.get("rotations", []),
        "calibration": {"sha256": "ab" * 32, "tokens": 1000},
        "stages": [output.stage],
    }
    output.finish(["all"], manifest | changes)
    return open_stats(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def decoded(source: Checkpoint, name: str) -> np.ndarray:
    info = source.info(name)
    if not info.packed:
        return source.read_float(name).numpy()
    return decode(info.format, source.packed(name).data.numpy(), *info.shape)


@pytest.mark.parametrize(
    "type_", ["Q2_K", "Q4_K_M", "Q3_K_S", "Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "IQ3_M", "IQ2_XXS", "U4", "U8-64"]
)
def test_writes_what_it_plans(model: Checkpoint, tmp_path: Path, type_: str) -> None:
    config = QuantizeConfig(type_, target="rondel" if type_[0] == "U" else None)
    planned = json.loads(json.dumps(plan(model, config)))
    made = quantize(model, tmp_path / "out", config)
    assert made.names() == [line["name"] for line in planned["tensors"]]
    for line in planned["tensors"]:
        info = made.info(line["name"])
        assert (info.format, list(info.shape)) == (line["format"], line["shape"])
        size = made.packed(info.name).data.numel() if info.packed else made.read(info.name).numel() * 4
        assert size == line["bytes"]
    assert (
        planned["bytes"] == sum(planned["bytes_by_type"].values()) == sum(line["bytes"] for line in planned["tensors"])
    )
    assert made.manifest["target"] == planned["config"]["target"]
    assert made.stages[-1]["config"] == planned["config"]


def test_floats_stay_and_errors_are_told(model: Checkpoint, tmp_path: Path) -> None:
    stats = make_stats(model, tmp_path / "stats")
    made = quantize(model, tmp_path / "out", QuantizeConfig("Q4_K_M"), stats)
    for name in ("blk.1.attn_norm.weight", "blk.2.attn_q.bias", "output_norm.weight"):
        assert made.info(name).format == "F32"
        assert torch.equal(made.read(name), model.read_float(name))
    told = made.manifest["quantization"]["tensors"]
    assert made.manifest["calibration"] == {"sha256": "ab" * 32, "tokens": 1000}
    for name, site in (("blk.1.ffn_down.weight", "hidden"), ("blk.0.attn_output.weight", "heads")):
        counts = stats.diagonal(int(name[4]), site).numpy().astype(np.float64)
        weights = model.read_float(name).numpy().astype(np.float64)
        lost = (np.square(weights - decoded(made, name)).sum(0) @ counts) / (np.square(weights).sum(0) @ counts)
        assert told[name]["error"] == pytest.approx(lost, rel=SAME_ERROR)
        assert told[name]["weighted"]
    assert not told["token_embd.weight"]["weighted"]
    assert told["output.weight"]["weighted"]


def test_statistics_lower_the_weighted_error(model: Checkpoint, tmp_path: Path) -> None:
    stats = make_stats(model, tmp_path / "stats")
    config = QuantizeConfig("Q3_K_S")
    weighted, plain = quantize(model, tmp_path / "a", config, stats), quantize(model, tmp_path / "b", config)
    counts = stats.diagonal(2, "ffn_in").numpy().astype(np.float64)
    name = "blk.2.ffn_up.weight"
    weights = model.read_float(name).numpy()
    errors = [np.square(weights - decoded(made, name)).sum(0) @ counts for made in (weighted, plain)]
    assert errors[0] < errors[1]


def test_an_imatrix_file_does_what_the_same_statistics_do(model: Checkpoint, tmp_path: Path) -> None:
    stats = make_stats(model, tmp_path / "stats")
    sums = {}
    for name in model.names():
        if name.startswith("blk.") and model.info(name).shape[1:]:
            _, layer, role, _ = name.split(".")
            sums[name] = (stats.diagonal(int(layer), model.family.linear(role).reads).numpy(), 1.0)
    sums["output.weight"] = (stats.diagonal(None, "output_in").numpy(), 1.0)
    write_imatrix(tmp_path / "imatrix.gguf", sums, datasets=["text"], chunk_size=512, chunk_count=1)
    config = QuantizeConfig("Q2_K")
    from_stats = quantize(model, tmp_path / "a", config, stats)
    from_file = quantize(model, tmp_path / "b", config, open_imatrix(tmp_path / "imatrix.gguf"))
    for name in model.names():
        assert from_stats.info(name).sha256 == from_file.info(name).sha256, name


def test_rows_that_fit_no_block_fall_back_and_say_so(narrow: Checkpoint, tmp_path: Path) -> None:
    made = quantize(narrow, tmp_path / "out", QuantizeConfig("Q4_K_M"))
    told = made.manifest["quantization"]
    assert made.info("token_embd.weight").format == "Q8_0"
    assert (
        told["tensors"]["blk.0.attn_q.weight"] | {"format": "Q5_0", "instead_of": "Q4_K"}
        == told["tensors"]["blk.0.attn_q.weight"]
    )
    down = made.info("blk.0.ffn_down.weight")
    assert down.format == "F16"
    exact = narrow.read_float(down.name)
    assert torch.allclose(made.read_float(down.name), exact, rtol=HALF_ROUNDING, atol=2**-25)
    assert any("14 matrices" in warning for warning in told["warnings"])
    assert plan(narrow, QuantizeConfig("Q4_K_M"))["fallbacks"] == 14


def test_overrides(model: Checkpoint, tmp_path: Path) -> None:
    config = QuantizeConfig("Q2_K", tensors=((r"blk\.1\.ffn_down", "q8_0"), ("ffn_down", "q4_k"), ("output", "F16")))
    formats = {line["name"]: line["format"] for line in plan(model, config)["tensors"]}
    assert formats["blk.0.ffn_down.weight"] == "Q4_K"
    assert formats["blk.1.ffn_down.weight"] == "Q8_0"
    assert formats["blk.1.attn_output.weight"] == formats["output.weight"] == "F16"
    assert formats["output_norm.weight"] == "F32"
    pure = plan(model, QuantizeConfig("Q6_K", pure=True))
    assert set(pure["bytes_by_type"]) == {"F32", "Q6_K"}
    assert pure["bytes_by_type"]["Q6_K"] == sum(
        format_bytes("Q6_K", *line["shape"]) for line in pure["tensors"] if line["format"] == "Q6_K"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantizeConfig("Q7_K"), "Q7_K.*expected one of"),
        (QuantizeConfig("U4"), "--target rondel"),
        (QuantizeConfig("Q4_K", tensors=(("ffn", "U8"),)), "--target rondel"),
        (QuantizeConfig("Q4_K", tensors=(("ffn_dwon", "Q8_0"),)), "ffn_dwon.*no tensor"),
        (QuantizeConfig("Q4_K", tensors=(("ffn_(", "Q8_0"),)), "not a regular expression"),
        (QuantizeConfig("Q4_K", tensors=(("ffn", "Q4_K_M"),)), "Q4_K_M"),
        (QuantizeConfig("Q4_K", target="ollama"), "--target ollama"),
    ],
)
def test_refuses_before_it_writes(model: Checkpoint, tmp_path: Path, config: QuantizeConfig, message: str) -> None:
    for act in (lambda: plan(model, config), lambda: quantize(model, tmp_path / "out", config)):
        with pytest.raises(RondelError, match=message):
            act()
    assert not list(tmp_path.iterdir())


def test_refuses_what_is_quantized_already(model: Checkpoint, tmp_path: Path) -> None:
    made = quantize(model, tmp_path / "out", QuantizeConfig("Q8_0"))
    with pytest.raises(RondelError, match="quantized already"):
        quantize(made, tmp_path / "again", QuantizeConfig("Q4_K"))


def test_refuses_statistics_of_another_basis_or_model(model: Checkpoint, narrow: Checkpoint, tmp_path: Path) -> None:
    turned = {"site": "residual", "kind": "hadamard", "online": False, "size": WIDTH, "block": WIDTH, "signs": "00"}
    stats = make_stats(model, tmp_path / "stats", rotations=[turned])
    with pytest.raises(RondelError, match="another basis"):
        plan(model, QuantizeConfig("Q4_K"), stats)
    other = make_stats(narrow, tmp_path / "other")
    with pytest.raises(RondelError, match="another model"):
        plan(model, QuantizeConfig("Q4_K"), other)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the stage catches it."""


def test_resumes_behind_the_last_finished_shard(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, stats = QuantizeConfig("Q4_K_M"), make_stats(model, tmp_path / "stats")
    whole = quantize(model, tmp_path / "whole", config, stats, threads=1)
    write: Callable[..., None] = StageOutput.write
    shards: list[str] = []

    def write_two(self: StageOutput, shard: str, *rest: Any) -> None:
        if len(shards) == 2:
            raise Killed
        write(self, shard, *rest)
        shards.append(shard)

    monkeypatch.setattr(stage.StageOutput, "write", write_two)
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", config, stats)
    assert not (tmp_path / "out").exists()
    shards.clear()
    monkeypatch.setattr(
        stage.StageOutput, "write", lambda self, shard, *rest: (write(self, shard, *rest), shards.append(shard))
    )
    quantize(model, tmp_path / "out", config, stats, threads=2)
    assert shards == ["blk-00001", "blk-00002", "output"]
    assert contents(tmp_path / "out") == contents(whole.root)
    shards.clear()
    quantize(model, tmp_path / "out", config, stats)
    assert not shards  # a finished output is left as it is
    with pytest.raises(RondelError, match="--force"):
        quantize(model, tmp_path / "out", QuantizeConfig("Q2_K"), stats)


def test_methods(model: Checkpoint, tmp_path: Path) -> None:
    """rtn takes no notice of the statistics, imatrix is what happens unasked."""
    stats = make_stats(model, tmp_path / "stats")
    config = QuantizeConfig("Q3_K_S")
    plain = quantize(model, tmp_path / "plain", config)
    weighted = quantize(model, tmp_path / "weighted", config, stats)
    for method, same in (("rtn", plain), ("imatrix", weighted)):
        made = quantize(model, tmp_path / method, replace(config, method=method), stats)
        assert made.stages[-1]["config"]["method"] == method
        for name in ("blk.0.ffn_down.weight", "output.weight"):
            assert made.info(name).sha256 == same.info(name).sha256, (method, name)


@pytest.mark.parametrize("name", ["gptk", "", "imatrix+", "+imatrix", "imatrix+rtn", "awq+awq+imatrix"])
def test_unknown_methods_are_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(RondelError, match=r"--method .*: expected one of rtn, imatrix"):
        method_named(name)
