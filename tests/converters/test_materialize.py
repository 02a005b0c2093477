"""Serial copies as real layers: every gain is in the tensors, and llama.cpp computes what the copies compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.export import ExportConfig, export
from rondel.converters.folder import Packed
from rondel.converters.ggml_types import GGML_TYPES
from rondel.converters.gguf_keys import General, Rondel
from rondel.converters.output import StageOutput
from rondel.converters.replication import ATTENTION, BLOCK, FFN, NO_SLOT, ParameterSet, Replication, Step
from rondel.converters.replication_codec import encode_replication
from rondel.converters.rotation import Rotation
from rondel.converters.row_gains import SCALE_OFFSETS, fold_into_blocks
from rondel.native.formats import decode
from rondel.native.model import Model, Session
from tests.tiny import tiny_model

WIDTH, HEADS, HIDDEN = 64, 4, 96
FLOAT32_ROUNDING = 1e-5  # relative to the largest logit: gains are applied before sums instead of behind them
HALF_ULP = 2.0**-11  # of a float16 scale, relative
MATERIALIZED = ExportConfig(materialize=True)


def replicated(
    root: Path,
    copies: list[tuple[int, int, ParameterSet]],
    *,
    family: str = "llama",
    packed: str | None = None,
    **more: Any,
) -> Checkpoint:
    """A tiny model whose layers are followed by `copies` (layer, parts, parameters), feed-forward packed if wanted."""
    source = open_checkpoint(tiny_model(family, root / "model", width=WIDTH, heads=HEADS, hidden=HIDDEN))
    steps: list[Step] = []
    slots = 0
    for layer in range(source.numbers.layers):
        steps.append(Step(layer, 0, len(steps), slots))
        slots += 1
        for number, (index, (_, parts, _)) in enumerate(
            ((i, copy) for i, copy in enumerate(copies) if copy[0] == layer), start=1
        ):
            slot = slots if parts & ATTENTION else NO_SLOT
            slots += slot != NO_SLOT
            steps.append(Step(layer, number, len(steps), slot, parts, index + 1))
    found = Replication(source.numbers.layers, tuple(steps), tuple([0] * len(steps)), tuple(copy[2] for copy in copies))
    manifest = {**source.carried(), "replication": encode_replication(found, source.numbers), **more}
    return write(source, root / "replicated", manifest, packed)


def write(source: Checkpoint, out: Path, manifest: dict[str, Any], packed: str | None) -> Checkpoint:
    stage = {"name": "replicate", "version": "0", "config": {}, "inputs": {}}
    output = StageOutput(out, stage)
    for shard, names in source.shards().items():
        tensors: dict[str, torch.Tensor | Packed] = {name: source.read(name) for name in names}
        for name in names if packed else []:
            if ".ffn_" in name and not name.endswith("norm.weight"):
                data = quantize(source.read(name).numpy(), gguf.GGMLQuantizationType[str(packed)])
                tensors[name] = Packed(torch.from_numpy(data.reshape(-1)), str(packed), source.info(name).shape)
        output.write(shard, tensors)
    output.finish(list(source.shards()), {**manifest, "stages": [stage]}, source.side_files())
    return open_checkpoint(out)


def gates(attention: float = 0.5, ffn: float = 0.25, **more: np.ndarray) -> ParameterSet:
    values = {"gate_attn": np.array([attention]), "gate_ffn": np.array([ffn]), **more}
    return {kind: value.astype(np.float16).astype(np.float32) for kind, value in values.items()}


def spread(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 2.0, size)


def tensors_of(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def test_every_gain_is_in_the_tensors(tmp_path: Path) -> None:
    parameters = gates(
        attn_norm_gain=spread(WIDTH, 1),
        ffn_norm_gain=spread(WIDTH, 2),
        attn_out_gain=spread(WIDTH, 3),
        ffn_out_gain=spread(WIDTH, 4),
        q_head_gain=spread(HEADS, 5),
        ffn_hidden_gain=spread(HIDDEN, 6),
    )
    source = replicated(tmp_path, [(0, BLOCK, parameters)])
    keys, tensors = tensors_of(export(source, tmp_path / "f.gguf", MATERIALIZED)[0])
    assert keys["llama.block_count"] == 3
    assert keys[General.ARCHITECTURE] == "llama"
    assert not [key for key in keys if key.startswith(Rondel.REPLICATION)]
    base = {name: source.read(name).numpy() for name in source.names()}
    head_dim = WIDTH // HEADS
    gains = {
        "attn_norm": parameters["attn_norm_gain"],
        "ffn_norm": parameters["ffn_norm_gain"],
        "attn_output": 0.5 * parameters["attn_out_gain"][:, None],
        "ffn_down": 0.25 * parameters["ffn_out_gain"][:, None],
        "attn_q": np.repeat(parameters["q_head_gain"], head_dim)[:, None],
        "ffn_up": parameters["ffn_hidden_gain"][:, None],
    }
    for role in (
        "attn_norm",
        "ffn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ):
        copied = (base[f"blk.0.{role}.weight"].astype(np.float64) * gains.get(role, 1.0)).astype(np.float32)
        assert np.array_equal(tensors[f"blk.1.{role}.weight"], copied), role
        assert np.array_equal(tensors[f"blk.0.{role}.weight"], base[f"blk.0.{role}.weight"]), role
        assert np.array_equal(tensors[f"blk.2.{role}.weight"], base[f"blk.1.{role}.weight"]), role
    assert list(tensors)[-2:] == ["output_norm.weight", "output.weight"]


def test_a_step_without_a_part_adds_nothing_there(tmp_path: Path) -> None:
    source = replicated(tmp_path, [(1, FFN, {"gate_ffn": np.ones(1, np.float32)})])
    _, tensors = tensors_of(export(source, tmp_path / "f.gguf", MATERIALIZED)[0])
    assert not tensors["blk.2.attn_output.weight"].any()
    assert np.array_equal(tensors["blk.2.ffn_down.weight"], tensors["blk.1.ffn_down.weight"])


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0", "Q5_1"])
def test_gains_of_packed_rows_go_into_their_scales(tmp_path: Path, format: str) -> None:
    parameters = gates(ffn_out_gain=spread(WIDTH, 1))
    source = replicated(tmp_path, [(0, BLOCK, parameters)], packed=format)
    _, tensors = tensors_of(export(source, tmp_path / "f.gguf", MATERIALIZED)[0])
    expected = tensors["blk.0.ffn_down.weight"] * (0.25 * parameters["ffn_out_gain"][:, None])
    off = np.abs(tensors["blk.1.ffn_down.weight"] - expected)
    # Q5_1 has a scale and a minimum of its own, both rounded; each value is their sum.
    assert off.max() <= 2 * HALF_ULP * np.abs(expected).max()
    assert np.array_equal(tensors["blk.1.ffn_up.weight"], tensors["blk.0.ffn_up.weight"])


@pytest.mark.parametrize("format", sorted(SCALE_OFFSETS))
def test_a_power_of_two_is_folded_exactly_into_every_format(format: str) -> None:
    block, size = GGML_TYPES[format].block, GGML_TYPES[format].bytes
    blocks = np.random.default_rng(0).integers(0, 256, (8, size), np.uint8)
    for offset in SCALE_OFFSETS[format]:
        blocks[:, offset : offset + 2] = np.linspace(0.25, 3.0, 8).astype("<f2")[:, None].view(np.uint8)
    gain = np.array([1.0, 0.5, -2.0, 4.0, 0.0, 1.0, 0.25, -1.0])
    folded = fold_into_blocks(blocks.reshape(-1), format, gain, "x")
    expected = gain[:, None].astype(np.float32) * decode(format, blocks.reshape(-1), 8, block)
    assert np.array_equal(decode(format, folded, 8, block), expected)


def test_gains_that_a_scale_cannot_hold_are_refused() -> None:
    block = np.zeros(34, np.uint8)
    block[:2] = np.array([60000.0], "<f2").view(np.uint8)
    with pytest.raises(RondelError, match="beyond float16"):
        fold_into_blocks(block, "Q8_0", np.array([2.0]), "blk.0.ffn_down.weight")
    with pytest.raises(RondelError, match="MXFP4"):
        fold_into_blocks(block[:17], "MXFP4", np.array([2.0]), "blk.0.ffn_down.weight")


def test_rotations_follow_their_layers(tmp_path: Path) -> None:
    rotation = Rotation("hidden", "hadamard", True, HIDDEN, 32, "00" * 12, (1,))
    source = replicated(tmp_path, [(0, BLOCK, gates()), (1, BLOCK, gates())], rotations=[rotation.to_json()])
    keys, _ = tensors_of(export(source, tmp_path / "f.gguf", MATERIALIZED)[0])
    assert keys["rondel.rotation.0.layers"] == [2, 3]


@pytest.mark.parametrize(
    ("family", "parameters", "words"),
    [
        ("llama", {"ffn_out_bias": np.ones(WIDTH)}, "ffn_out_bias of a copy of layer 0 .* no place"),
        ("llama", {"attn_out_bias": np.ones(WIDTH)}, "attn_out_bias of a copy of layer 0 .* no place"),
        ("llama", {"act_bits": np.full(1, 8)}, "act_bits .* how activations are rounded"),
        ("llama", {"rounding": np.full(1, 3)}, "rounding .* how activations are rounded"),
        (
            "llama",
            {"ffn_up_left": np.ones((HIDDEN, 1)), "ffn_up_right": np.ones((1, WIDTH))},
            "low-rank term of ffn_up of a copy of layer 0 .* LoRA",
        ),
        ("qwen3", {"q_head_gain": spread(HEADS, 1)}, "normalizes all query heads"),
    ],
)
def test_what_has_no_place_is_refused(tmp_path: Path, family: str, parameters: dict[str, Any], words: str) -> None:
    source = replicated(tmp_path, [(0, BLOCK, gates(**parameters))], family=family)
    with pytest.raises(RondelError, match=words):
        export(source, tmp_path / "f.gguf", MATERIALIZED)


@pytest.mark.parametrize(
    ("copy", "merges", "words"),
    [
        (Step(0, 1, 0, 1, BLOCK, 1), (2, 0), "in parallel"),
        (Step(0, 1, 1, 0, BLOCK, 1), (0, 0, 0), "KV cache"),
    ],
)
def test_paths_that_are_no_layers_are_refused(tmp_path: Path, copy: Step, merges: tuple[int, ...], words: str) -> None:
    source = open_checkpoint(tiny_model("llama", tmp_path / "model"))
    steps = (Step(0, 0, 0, 0), copy, Step(1, 0, copy.group + 1, max(copy.slot, 0) + 1))
    record = encode_replication(Replication(2, steps, merges, (gates(),)), source.numbers)
    parallel = write(source, tmp_path / "replicated", {**source.carried(), "replication": record}, None)
    with pytest.raises(RondelError, match=words):
        export(parallel, tmp_path / "f.gguf", MATERIALIZED)


def test_layers_compute_what_steps_compute(tmp_path: Path) -> None:
    """rondel's runtime on the replicated file, against the same on the file with a layer for each step."""
    parameters = gates(
        attn_norm_gain=spread(WIDTH, 1),
        ffn_norm_gain=spread(WIDTH, 2),
        attn_out_gain=spread(WIDTH, 3),
        ffn_out_gain=spread(WIDTH, 4),
        q_head_gain=spread(HEADS, 5),
        ffn_hidden_gain=spread(HIDDEN, 6),
    )
    source = replicated(tmp_path, [(0, BLOCK, parameters), (1, FFN, {"gate_ffn": np.full(1, 0.5, np.float32)})])
    logits = []
    for config in (ExportConfig(type="F32"), ExportConfig(type="F32", materialize=True)):
        (path,) = export(source, tmp_path / f"{config.materialize}.gguf", config)
        with Model(path) as model, Session(model) as session:
            assert model.steps() == 4
            logits.append(session.eval([3, 5, 7, 11, 13], all=True))
    assert np.abs(logits[0] - logits[1]).max() <= FLOAT32_ROUNDING * np.abs(logits[0]).max()


@pytest.mark.peer
def test_llama_cpp_runs_closed_copies_like_the_base_model(tmp_path: Path) -> None:
    from tests.peer.llama import Llama, find_library

    if find_library() is None:
        pytest.skip("llama.cpp is not installed (extra `peer`)")
    source = replicated(tmp_path, [(0, BLOCK, gates(0.0, 0.0)), (1, FFN, {"gate_ffn": np.zeros(1, np.float32)})])
    logits = []
    for config in (ExportConfig(), MATERIALIZED):
        (path,) = export(source, tmp_path / f"{config.materialize}.gguf", config)
        with Llama(path, context=64, threads=1) as model:
            logits.append(model.eval([3, 5, 7, 11, 13]))
    assert np.array_equal(logits[0], logits[1])
