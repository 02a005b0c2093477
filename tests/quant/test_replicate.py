"""Replicate: specifications, the folder it writes, and what its steps compute."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.export import ExportConfig, export
from rondel.converters.replication import ATTENTION, BLOCK, FFN, Replication
from rondel.converters.replication_codec import PREFIX, decode_replication
from rondel.native import Model, Session
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.reference import ReferenceModel, reference_logits
from rondel.quant.replicate import (
    ReplicateConfig,
    Specification,
    build_replication,
    parse_specification,
    plan,
    replicate,
)
from rondel.quant.replication_reference import ReplicatedReference, replicated_logits
from rondel.quant.rotate import RotateConfig, rotate
from tests.tiny import tiny_model

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
ROUNDING64 = 1e-12  # relative, of sums in another order in float64
FLOAT32_ERROR = 1e-5  # of the largest logit: float32 against float64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("qwen3", tmp_path_factory.mktemp("tiny") / "m", layers=3, vocabulary=64))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= ROUNDING64 * b.abs().max())


def logits(
    source: Checkpoint, *layers: str, gate: float | None = None, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    built = build_replication(ReplicateConfig(layers, gate=gate), source.numbers)
    assert built is not None
    return ReplicatedReference(source, built, dtype).logits(TOKENS)


# ---- the grammar ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:serial:1", Specification(2, "serial", 1, "none", BLOCK, 0.1, 1.0)),
        ("5:parallel:2:mean", Specification(5, "parallel", 2, "mean", BLOCK, 1.0, 1.0)),
        ("5:parallel:2", Specification(5, "parallel", 2, "mean", BLOCK, 1.0, 1.0)),
        ("0:parallel:1:ffn:sum", Specification(0, "parallel", 1, "sum", FFN, 0.1, 1.0)),
        ("3:serial:1:attn:0.25", Specification(3, "serial", 1, "none", ATTENTION, 0.25, 1.0)),
        ("3:serial:1:gate=-0.5:gain=0.9", Specification(3, "serial", 1, "none", BLOCK, -0.5, 0.9)),
    ],
)
def test_specifications(text: str, expected: Specification) -> None:
    assert parse_specification(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("2", "expected LAYER:MODE:COPIES"),
        ("2:serial", "expected LAYER:MODE:COPIES"),
        ("-1:serial:1", "expected LAYER:MODE:COPIES"),
        ("2:twice:1", "expected LAYER:MODE:COPIES"),
        ("2:serial:one", "expected LAYER:MODE:COPIES"),
        ("2:serial:0", "COPIES must be 1 to 255"),
        ("2:serial:256", "COPIES must be 1 to 255"),
        ("2:serial:1:mean", "serial copies are not merged"),
        ("2:parallel:1:max", "'max' is no merge|gate must be"),
        ("2:parallel:1:attn", "halves the rest"),
        ("2:serial:1:0.5:0.25", "gate is given twice"),
        ("2:serial:1:ffn:attn", "parts is given twice"),
        ("2:serial:1:gate=nan", "gate must be a float16 number"),
        ("2:serial:1:gate=1e6", "gate must be a float16 number"),
        ("2:serial:1:norm=1", "'norm=1' is no merge"),
    ],
)
def test_what_is_no_specification_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(RondelError, match=sentence):
        parse_specification(text)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ReplicateConfig(("3:serial:1",)), "the model has the layers 0 to 2"),
        (ReplicateConfig(("1:parallel:1", "1:parallel:1")), "two parallel specifications"),
        (ReplicateConfig(("1:serial:200", "1:serial:100")), "more than 255 copies"),
        (ReplicateConfig(("1:serial:1",), gate=float("nan")), "--gate must be"),
        (ReplicateConfig(("1:serial:1",), strict=True, target="llama.cpp"), "--strict"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_is_written(
    config: ReplicateConfig, sentence: str, source: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(RondelError, match=sentence):
        replicate(source, tmp_path / "out", config)
    with pytest.raises(RondelError, match=sentence):
        plan(source, config)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_no_number_leaves_no_folder(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m", vocabulary=64)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(RondelError, match=r"model\.norm\.weight holds 1 NaN"):
        replicate(open_checkpoint(folder), tmp_path / "out", ReplicateConfig())
    assert list(tmp_path.iterdir()) == [folder]


# ---- the folder ----


def test_the_record_is_in_the_manifest_and_the_tensors_are_shared(source: Checkpoint, tmp_path: Path) -> None:
    first = replicate(source, tmp_path / "none", ReplicateConfig())
    assert "replication" not in first.manifest
    assert "no layer is replicated" in first.stages[-1]["result"]["notes"][0]
    config = ReplicateConfig(("0:serial:1:gate=0.5:gain=0.75", "2:parallel:2:mean"), target="rondel")
    out = replicate(first, tmp_path / "out", config)
    found, warnings = decode_replication(out.manifest["replication"], out.numbers)
    assert warnings == []
    assert isinstance(found, Replication)
    assert [(step.layer, step.number, step.group, step.slot) for step in found.steps] == [
        (0, 0, 0, 0),
        (0, 1, 1, 1),
        (1, 0, 2, 2),
        (2, 0, 3, 3),
        (2, 1, 3, 3),
        (2, 2, 3, 3),
    ]
    assert found.parameters(found.steps[1])["gate_ffn"].tolist() == [0.5]
    assert np.all(found.parameters(found.steps[1])["attn_out_gain"] == 0.75)
    assert json.loads(out.manifest["replication"][PREFIX + "json"]) == {
        "layer_0": {"type": "serial", "copies": 1, "shared_weight": True},
        "layer_2": {"type": "parallel", "copies": 2, "shared_weight": True, "merge_strategy": "mean"},
    }
    assert out.manifest["target"] == "rondel"
    assert [stage["name"] for stage in out.stages] == ["replicate", "replicate"]
    assert out.names() == source.names()
    for name in source.names():
        assert torch.equal(out.read(name), source.read(name))
        assert (out.root / out.info(name).shard).samefile(first.root / first.info(name).shard)
    assert out.side_files().keys() == source.side_files().keys()


def test_two_runs_write_the_same_bytes_and_a_replicated_model_is_not_replicated_again(
    source: Checkpoint, tmp_path: Path
) -> None:
    config = ReplicateConfig(("1:serial:2",))
    one, two = (replicate(source, tmp_path / name, config) for name in ("a", "b"))
    assert all((two.root / path.name).read_bytes() == path.read_bytes() for path in one.root.iterdir())
    with pytest.raises(RondelError, match=r"is replicated already"):
        replicate(one, tmp_path / "c", config)


def test_the_weights_under_copies_do_not_change_any_more(source: Checkpoint, tmp_path: Path) -> None:
    made = replicate(source, tmp_path / "r", ReplicateConfig(("1:serial:1",)))
    with pytest.raises(RondelError, match=r"is replicated.*rotate before"):
        rotate(made, tmp_path / "out", RotateConfig())
    with pytest.raises(RondelError, match=r"is replicated.*quantize before"):
        quantize(made, tmp_path / "out", QuantizeConfig())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_hash_binds_the_parameters_to_the_replicated_layers(tmp_path: Path) -> None:
    hashes = []
    for seed in (0, 0, 1):
        folder = tiny_model("llama", tmp_path / f"{len(hashes)}", vocabulary=64, seed=seed)
        made = replicate(open_checkpoint(folder), tmp_path / f"out{len(hashes)}", ReplicateConfig(("1:serial:1",)))
        hashes.append(made.manifest["replication"][PREFIX + "base.sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_plan_tells_what_would_be_written(source: Checkpoint) -> None:
    told = json.loads(json.dumps(plan(source, ReplicateConfig(("1:serial:1:gain=2", "0:parallel:1:mean")))))
    assert (told["steps"], told["kv_slots"]) == (5, 4)
    assert {(layer["layer"], layer["mode"], layer["parts"]) for layer in told["layers"]} == {
        (0, "parallel", "block"),
        (1, "serial", "block"),
    }
    assert told["parameter_bytes"] == 2 * (2 + 2 + 2 * source.numbers.width)
    assert told["notes"] == [
        "layer 0: these parallel copies are algebraically redundant, they fold into one gain of the layer"
    ]


# ---- what the steps compute ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_gates_leave_every_bit_as_it_was(source: Checkpoint, dtype: torch.dtype) -> None:
    base = reference_logits(source, TOKENS, dtype)
    for layers in (("0:serial:1", "2:serial:2"), ("1:parallel:2:sum",), ("1:parallel:1:sum", "1:serial:1:ffn")):
        assert torch.equal(logits(source, *layers, gate=0.0, dtype=dtype), base)


def test_an_open_serial_copy_is_the_layer_run_twice(source: Checkpoint) -> None:
    model = ReferenceModel(source)
    x = model.embed(TOKENS)
    for layer in (0, 1, 1, 2):
        x = model.block(layer, x)
    assert close(logits(source, "1:serial:1:gate=1"), model.head(x))
    assert not close(logits(source, "1:serial:1:gate=1"), reference_logits(source, TOKENS))


def test_parts_and_gates_of_serial_copies(source: Checkpoint) -> None:
    model = ReferenceModel(source)
    x = model.block(0, model.embed(TOKENS))
    x = x + 0.5 * model._feed_forward(0, model._norm(0, "ffn_norm", x))
    x = model.block(1, x)
    x = x + 0.25 * 3 * model._attention(1, model._norm(1, "attn_norm", x))
    expected = model.head(model.block(2, x))
    assert close(logits(source, "0:serial:1:ffn:0.5", "1:serial:1:attn:0.25:gain=3"), expected)


def test_redundant_parallel_copies_fold(source: Checkpoint) -> None:
    base = reference_logits(source, TOKENS)
    assert close(logits(source, "1:parallel:3:mean"), base)
    model = ReferenceModel(source)
    x = model.block(0, model.embed(TOKENS))
    attention = model._attention(1, model._norm(1, "attn_norm", x))
    x = model.block(1, x) + 2 * 0.25 * attention
    assert close(logits(source, "1:parallel:2:sum:attn:0.25"), model.head(model.block(2, x)))


def test_shared_keys_are_those_of_the_first_pass(source: Checkpoint) -> None:
    own = build_replication(ReplicateConfig(("1:serial:1:gate=1",)), source.numbers)
    shared = build_replication(ReplicateConfig(("1:serial:1:gate=1",), kv="shared"), source.numbers)
    assert own is not None
    assert shared is not None
    assert (own.slots(), shared.slots()) == (4, 3)
    a, b = (ReplicatedReference(source, built).logits(TOKENS) for built in (own, shared))
    assert not close(a, b)
    parallel = [
        build_replication(ReplicateConfig(("1:parallel:1:sum:0.5",), kv=kv), source.numbers)  # type: ignore[arg-type]
        for kv in ("own", "shared")
    ]
    a, b = (ReplicatedReference(source, built).logits(TOKENS) for built in parallel if built)
    assert torch.equal(a, b)  # parallel copies read the same input, so their keys are the same


def test_every_kind_of_parameter_changes_the_logits(source: Checkpoint) -> None:
    built = build_replication(ReplicateConfig(("1:serial:1:gate=0.5",)), source.numbers)
    assert built is not None
    before = ReplicatedReference(source, built).logits(TOKENS)
    for kind, size in (
        ("attn_norm_gain", 64),
        ("ffn_norm_gain", 64),
        ("attn_out_gain", 64),
        ("ffn_out_gain", 64),
        ("attn_out_bias", 64),
        ("ffn_out_bias", 64),
        ("q_head_gain", 4),
        ("ffn_hidden_gain", 96),
    ):
        changed = replace(built, sets=({**built.sets[0], kind: np.full(size, 1.5, np.float32)},))
        assert not close(ReplicatedReference(source, changed).logits(TOKENS), before), kind


def test_logits_follow_the_manifest(source: Checkpoint, tmp_path: Path) -> None:
    out = replicate(source, tmp_path / "out", ReplicateConfig(("1:serial:1:gate=0.5",)))
    assert torch.equal(replicated_logits(out, TOKENS), logits(source, "1:serial:1:gate=0.5"))
    assert torch.equal(replicated_logits(source, TOKENS), reference_logits(source, TOKENS))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("layers", "kv"),
    [
        (("0:serial:1:0.5", "1:parallel:2:sum:gain=0.9:0.3", "1:serial:1:ffn:0.25"), None),
        (("1:parallel:2:mean:0.5", "0:serial:2:attn:0.7"), "shared"),
    ],
)
def test_the_runtime_executes_the_same_steps(
    layers: tuple[str, ...], kv: Literal["shared"] | None, family: str, tmp_path: Path
) -> None:
    folder = tiny_model(family, tmp_path / "m", tied=family == "qwen2")
    made = replicate(open_checkpoint(folder), tmp_path / "r", ReplicateConfig(layers, kv=kv))
    file = export(made, tmp_path / "m.gguf", ExportConfig(type="F32"))[0]
    expected = replicated_logits(made, TOKENS).numpy()
    with Model(file) as model, Session(model, threads=1) as session:
        assert model.warnings == []
        assert model.steps() == 6
        whole = session.eval(TOKENS.numpy(), all=True)
        assert np.abs(whole - expected).max() <= FLOAT32_ERROR * np.abs(expected).max()
        one_by_one = [session.eval([int(token)], position=i)[-1] for i, token in enumerate(TOKENS)]
        assert np.abs(np.stack(one_by_one) - expected).max() <= FLOAT32_ERROR * np.abs(expected).max()


def test_a_device_that_torch_cannot_use_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(RondelError, match="--device nonsense"):
        replicate(source, tmp_path / "out", ReplicateConfig(), device="nonsense")
    assert not any(tmp_path.iterdir())
