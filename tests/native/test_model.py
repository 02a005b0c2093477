"""Models: every tensor is checked, formats of both kinds run, online rotations, and refusals that name the cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rondel.native import Model, NativeError, Session, cpu_count, decode, encode, read_bandwidth
from rondel.native.library import ffi, lib
from tests.native.reference import (
    Numbers,
    Step,
    Tensors,
    add_hyperparameters,
    forward,
    plain_steps,
    random_bits,
    random_weights,
    replication_keys,
    rotation_keys,
    write_gguf,
)

TOKENS = [3, 17, 5, 59, 0, 3, 41, 22, 8, 13]
NUMBERS = Numbers()
TYPES = gguf.GGUFValueType
HALF_ERROR = 2e-2  # keys, values and their sums in half precision, in three layers
LARGEST_ERROR = 1e-5  # float32 against float64, see test_session.py
# Activations are rounded to 8 bits, per block or per row, in three layers: each adds about a percent.
ROUNDING_ERROR = 0.1


def logits(path: Path, **settings: Any) -> np.ndarray:
    with Model(path) as model, Session(model, threads=1, **settings) as session:
        return session.eval(TOKENS, all=True)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name) is None


def with_tensor(name: str, value: np.ndarray) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


WRONG_TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no embedding": (without("token_embd.weight"), "token_embd.weight is missing, which a llama model needs"),
    "no matrix": (without("blk.2.ffn_up.weight"), "blk.2.ffn_up.weight is missing"),
    "no norm": (without("blk.1.attn_norm.weight"), "blk.1.attn_norm.weight is missing"),
    "rows": (
        with_tensor("blk.0.attn_q.weight", np.zeros((31, 32), np.float32)),
        r"blk.0.attn_q.weight has the shape \(31, 32\), expected \(32, 32\)",
    ),
    "columns": (
        with_tensor("blk.0.ffn_down.weight", np.zeros((32, 47), np.float32)),
        r"has the shape \(32, 47\), expected \(32, 48\)",
    ),
    "three dimensions": (with_tensor("blk.0.ffn_down.weight", np.zeros((2, 32, 48), np.float32)), "has the shape"),
    "head": (with_tensor("output.weight", np.zeros((61, 32), np.float32)), r"shape \(61, 32\), expected \(60, 32\)"),
    "norm size": (with_tensor("output_norm.weight", np.zeros(31, np.float32)), "has 31 values, expected 32"),
    "norm type": (with_tensor("output_norm.weight", np.zeros(32, np.float16)), "has the type F16, expected F32"),
    "bias size": (with_tensor("blk.0.attn_k.bias", np.zeros(15, np.float32)), "has 15 values, expected 16"),
    "matrix type": (with_tensor("blk.0.ffn_up.weight", np.zeros((48, 32), np.int32)), "type I32, which this runtime"),
    "stranger": (with_tensor("blk.0.ffn_gate_inp.weight", np.zeros((4, 32), np.float32)), "does not belong to a llama"),
    "frequencies": (with_tensor("rope_freqs.weight", np.zeros(4, np.float32)), "rope_freqs.weight holds a zero"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors_are_named(name: str, tmp_path: Path) -> None:
    change, sentence = WRONG_TENSORS[name]
    tensors = random_weights(NUMBERS)
    change(tensors)
    with pytest.raises(NativeError, match=sentence):
        Model(write_gguf(tmp_path / "m.gguf", NUMBERS, tensors))


WRONG_NUMBERS: dict[str, tuple[Numbers, str]] = {
    "family": (replace(NUMBERS, family="gpt2"), "architecture 'gpt2' is not supported"),
    "no layers": (replace(NUMBERS, layers=0), "llama.block_count is 0"),
    "many layers": (replace(NUMBERS, layers=60000), "60000 layers, but only"),
    "heads": (replace(NUMBERS, heads=3), "do not fit each other"),
    "odd head": (replace(NUMBERS, head_dim=7), "do not fit each other"),
    "epsilon": (replace(NUMBERS, epsilon=-1.0), "epsilon is missing or negative"),
    "infinite": (replace(NUMBERS, rope_base=float("inf")), "must be a finite number"),
    "rope base": (replace(NUMBERS, rope_base=0.0), "not positive"),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_wrong_hyperparameters_are_named(name: str, tmp_path: Path) -> None:
    numbers, sentence = WRONG_NUMBERS[name]
    with pytest.raises(NativeError, match=sentence):
        Model(write_gguf(tmp_path / "m.gguf", numbers, random_weights(NUMBERS)))


WRONG_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"llama.expert_count": (8, TYPES.UINT32, None)}, "mixture of 8 experts"),
    "yarn": ({"llama.rope.scaling.type": ("yarn", TYPES.STRING, None)}, "RoPE scaling 'yarn' is not supported"),
    "partial rope": ({"llama.rope.dimension_count": (4, TYPES.UINT32, None)}, "RoPE on 4 of 8 channels"),
    "encoder": ({"llama.attention.causal": (False, TYPES.BOOL, None)}, "not causal"),
    "text as number": ({"llama.expert_count": ("8", TYPES.STRING, None)}, "must be an integer"),
}


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_what_is_not_supported_is_named(name: str, tmp_path: Path) -> None:
    keys, sentence = WRONG_KEYS[name]
    with pytest.raises(NativeError, match=sentence):
        Model(write_gguf(tmp_path / "m.gguf", NUMBERS, random_weights(NUMBERS), keys))


@pytest.mark.parametrize("head_counts", [[4, 4, 4], [4, 2, 4]])
def test_numbers_for_each_layer_must_agree(head_counts: list[int], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add_hyperparameters(writer, NUMBERS)
    writer.kv_data[0].pop("llama.attention.head_count")
    writer.add_array("llama.attention.head_count", head_counts)
    for name, tensor in random_weights(NUMBERS).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if len(set(head_counts)) == 1:
        Model(path).close()
    else:
        with pytest.raises(NativeError, match="head_count differs between layers"):
            Model(path)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_block_types_of_ggml_run_in_place(name: str, tmp_path: Path) -> None:
    """Against float64 with the decoded weights: what remains is the rounding of activations."""
    numbers = Numbers("qwen3", width=64, hidden=96)
    weights = random_weights(numbers)
    quantized = gguf.GGMLQuantizationType[name]
    decoded = {
        key: gguf.quants.dequantize(gguf.quants.quantize(tensor, quantized), quantized) if tensor.ndim == 2 else tensor
        for key, tensor in weights.items()
    }
    expected = forward(numbers, decoded, TOKENS, plain_steps(numbers.layers), [0] * numbers.layers)
    got = logits(write_gguf(tmp_path / "m.gguf", numbers, weights, quantized=quantized))
    assert relative(got, expected) < ROUNDING_ERROR
    assert relative(got, forward(numbers, decoded, TOKENS[::-1], plain_steps(3), [0] * 3)) > 5 * ROUNDING_ERROR


def write_tiles(path: Path, numbers: Numbers, tensors: Tensors, form: str) -> Tensors:
    """Every matrix in a tile format, for rondel alone; returns the weights as the file holds them."""
    writer = gguf.GGUFWriter(path, "rondel")
    writer.arch = numbers.family
    add_hyperparameters(writer, numbers)
    writer.add_string("rondel.architecture", numbers.family)
    writer.add_custom_alignment(64)
    writer.add_array("rondel.requires", ["tile-1"])
    names = [name for name, tensor in tensors.items() if tensor.ndim == 2]
    writer.add_array("rondel.tensor.name", names)
    writer.add_array("rondel.tensor.format", [form] * len(names))
    shapes = [number for name in names for number in (tensors[name].shape[1], tensors[name].shape[0], 1, 1)]
    writer.add_key_value("rondel.tensor.shape", shapes, TYPES.ARRAY, sub_type=TYPES.UINT64)
    held = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            packed = encode(form, tensor)
            held[name] = decode(form, packed, *tensor.shape)
            writer.add_tensor(name, packed.view(np.int8))
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("form", ["U8-64", "U4-64"])
def test_extended_formats_run(form: str, tmp_path: Path) -> None:
    numbers = Numbers("qwen3", width=64, hidden=128, head_dim=16, vocabulary=70)  # 70 rows: the last panel is not full
    held = write_tiles(tmp_path / "m.gguf", numbers, random_weights(numbers), form)
    expected = forward(numbers, held, TOKENS, plain_steps(numbers.layers), [0] * numbers.layers)
    got = logits(tmp_path / "m.gguf")
    assert relative(got, expected) < ROUNDING_ERROR
    assert np.array_equal(logits(tmp_path / "m.gguf", batch=3), got)


def hadamard(size: int, block: int, signs: np.ndarray) -> np.ndarray:
    """The matrix that the runtime applies to rows: row i is the image of unit vector i."""
    rows = np.eye(size, dtype=np.float32)
    made = lib.rondel_hadamard_new(size, block, ffi.from_buffer("uint8_t[]", signs), 0)
    assert lib.rondel_hadamard_rows(made, ffi.from_buffer("float[]", rows, require_writable=True), size) == 0
    lib.rondel_hadamard_free(made)
    return rows


@pytest.mark.parametrize("layers", [None, [1]])
def test_online_rotations_of_hidden_cancel_rotated_columns(layers: list[int] | None, tmp_path: Path) -> None:
    signs = random_bits(48)
    weights = random_weights(NUMBERS)
    turned = dict(weights)
    matrix = hadamard(48, 48, signs).astype(np.float64)
    assert np.abs(matrix @ matrix.T - np.eye(48)).max() < 1e-6  # orthogonal in float32
    for layer in range(NUMBERS.layers) if layers is None else layers:
        name = f"blk.{layer}.ffn_down.weight"
        turned[name] = (weights[name] @ matrix).astype(np.float32)
    keys = rotation_keys("hidden", 48)
    if layers is not None:
        keys["rondel.rotation.0.layers"] = (layers, TYPES.ARRAY, TYPES.UINT32)
    expected = forward(NUMBERS, weights, TOKENS, plain_steps(3), [0] * 3)
    got = logits(write_gguf(tmp_path / "m.gguf", NUMBERS, turned, keys))
    assert relative(got, expected) < LARGEST_ERROR
    assert relative(logits(write_gguf(tmp_path / "n.gguf", NUMBERS, turned)), expected) > 100 * LARGEST_ERROR


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_online_rotations_before_quantized_columns(name: str, tmp_path: Path) -> None:
    """Quantized in the rotated basis, against float64 with the decoded weights turned back."""
    numbers = Numbers("qwen3", width=64, hidden=96)
    signs, quantized = random_bits(96), gguf.GGMLQuantizationType[name]
    matrix = hadamard(96, 96, signs).astype(np.float64)
    weights = random_weights(numbers)
    decoded = {}
    for key, tensor in weights.items():
        turned = (tensor @ matrix).astype(np.float32) if "ffn_down" in key else tensor
        weights[key] = turned
        held = turned
        if tensor.ndim == 2:
            held = gguf.quants.dequantize(gguf.quants.quantize(turned, quantized), quantized)
        decoded[key] = held @ matrix.T if "ffn_down" in key else held
    expected = forward(numbers, decoded, TOKENS, plain_steps(numbers.layers), [0] * numbers.layers)
    keys = rotation_keys("hidden", 96)
    got = logits(write_gguf(tmp_path / "m.gguf", numbers, weights, keys, quantized))
    assert relative(got, expected) < ROUNDING_ERROR
    without_rotation = logits(write_gguf(tmp_path / "n.gguf", numbers, weights, quantized=quantized))
    assert relative(without_rotation, expected) > 2 * ROUNDING_ERROR


# Turned queries meet turned keys: in float32 the same scores up to rounding, in every family and beside every cache.
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_online_rotations_of_queries_change_nothing(family: str, tmp_path: Path) -> None:
    numbers = Numbers(family, biases=family == "qwen2")
    weights = random_weights(numbers)
    expected = forward(numbers, weights, TOKENS, plain_steps(3), [0] * 3)
    keys = rotation_keys("queries", 8) | rotation_keys("hidden", 48, 12, 1, online=(False, TYPES.BOOL, None))
    path = write_gguf(tmp_path / "m.gguf", numbers, weights, keys)
    got = logits(path)
    assert relative(got, expected) < LARGEST_ERROR
    assert not np.array_equal(got, logits(write_gguf(tmp_path / "n.gguf", numbers, weights)))  # they were turned
    assert np.array_equal(logits(path, batch=1), got)
    assert relative(logits(path, kv="F16"), expected) < HALF_ERROR


def test_shared_keys_are_turned_as_their_writer_turned_them(tmp_path: Path) -> None:
    """A later pass over a layer with a rotation attends to the keys of the first."""
    steps = [*plain_steps(3), Step(0, 1, group=3, kv=0, parameters={"gate_attn": np.ones(1), "gate_ffn": np.ones(1)})]
    weights = random_weights(NUMBERS)
    keys = replication_keys(3, steps, [0] * 4)
    keys |= rotation_keys("queries", 8, layers=([0], TYPES.ARRAY, TYPES.UINT32))
    expected = forward(NUMBERS, weights, TOKENS, steps, [0] * 4)
    assert relative(logits(write_gguf(tmp_path / "m.gguf", NUMBERS, weights, keys)), expected) < LARGEST_ERROR


def turn_residual(weights: Tensors, matrix: np.ndarray, layers: int) -> Tensors:
    """Everything but the ends in a basis in which the residual stream x is x @ matrix, norms folded."""
    turned = dict(weights)
    for i in range(layers):
        for norm, readers in (("attn_norm", ("attn_q", "attn_k", "attn_v")), ("ffn_norm", ("ffn_gate", "ffn_up"))):
            gains = weights[f"blk.{i}.{norm}.weight"].astype(np.float64)
            turned[f"blk.{i}.{norm}.weight"] = np.ones_like(gains, np.float32)
            for role in readers:
                name = f"blk.{i}.{role}.weight"
                turned[name] = (weights[name] * gains @ matrix).astype(np.float32)
        for role in ("attn_output", "ffn_down"):
            name = f"blk.{i}.{role}.weight"
            turned[name] = (matrix.T @ weights[name]).astype(np.float32)
    return turned


@pytest.mark.parametrize("width", [32, 24])  # a symmetric matrix, and one that is not
@pytest.mark.parametrize("tied", [True, False])
def test_online_rotations_of_the_boundary_keep_the_ends(tied: bool, width: int, tmp_path: Path) -> None:
    numbers = Numbers("qwen3", width=width, tied=tied)
    weights = random_weights(numbers)
    matrix = hadamard(width, width, random_bits(width)).astype(np.float64)
    turned = turn_residual(weights, matrix, numbers.layers)
    expected = forward(numbers, weights, TOKENS, plain_steps(3), [0] * 3)
    path = write_gguf(tmp_path / "m.gguf", numbers, turned, rotation_keys("boundary", width))
    got = logits(path)
    assert relative(got, expected) < LARGEST_ERROR
    with Model(path) as model, Session(model, threads=1) as session:
        assert np.array_equal(session.eval(TOKENS), got[-1:].reshape(session.eval(TOKENS).shape))


WRONG_ROTATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "site": (rotation_keys("heads", 48), "site 'heads' is not supported"),
    "kind": (rotation_keys("hidden", 48, kind=("orthogonal", TYPES.STRING, None)), "'orthogonal'"),
    "size": (rotation_keys("hidden", 32), "has the size 32, the site hidden has 48"),
    "size of queries": (rotation_keys("queries", 48), "has the size 48, the site queries has 8"),
    "size of the boundary": (rotation_keys("boundary", 48), "has the size 48, the site boundary has 32"),
    "signs": (rotation_keys("hidden", 48, signs=([1, 2, 3], TYPES.ARRAY, TYPES.UINT8)), "array of 6 u8"),
    "layers": (rotation_keys("hidden", 48, layers=([3], TYPES.ARRAY, TYPES.UINT32)), "outside 0 to 2"),
    "layer twice": (
        rotation_keys("hidden", 48, layers=([1, 1], TYPES.ARRAY, TYPES.UINT32)),
        "two online rotations on one site",
    ),
    "block": (rotation_keys("hidden", 48, 7), "block|Hadamard"),
    "queries twice": (
        rotation_keys("queries", 8) | rotation_keys("queries", 8, 4, 1),
        "two online rotations on one site",
    ),
    "boundary twice": (
        rotation_keys("boundary", 32) | rotation_keys("boundary", 32, 16, 1),
        "two online rotations on the",
    ),
    "boundary of a layer": (
        rotation_keys("boundary", 32, layers=([0], TYPES.ARRAY, TYPES.UINT32)),
        "the boundary is no site of a layer",
    ),
}


@pytest.mark.parametrize("name", WRONG_ROTATIONS)
def test_wrong_rotations_are_named(name: str, tmp_path: Path) -> None:
    keys, sentence = WRONG_ROTATIONS[name]
    with pytest.raises(NativeError, match=sentence):
        Model(write_gguf(tmp_path / "m.gguf", NUMBERS, random_weights(NUMBERS), keys))


def test_fused_rotations_need_nothing(tmp_path: Path) -> None:
    weights = random_weights(NUMBERS)
    keys = rotation_keys("residual", 32, online=(False, TYPES.BOOL, None))
    plain = logits(write_gguf(tmp_path / "a.gguf", NUMBERS, weights))
    assert np.array_equal(logits(write_gguf(tmp_path / "b.gguf", NUMBERS, weights, keys)), plain)


def test_a_closed_model_says_so(tmp_path: Path) -> None:
    model = Model(write_gguf(tmp_path / "m.gguf", NUMBERS, random_weights(NUMBERS)))
    session = Session(model, threads=1)
    model.close()
    with pytest.raises(ValueError, match="closed"):
        Session(model)
    with pytest.raises(ValueError, match="closed"):
        session.eval(TOKENS)


def test_a_model_keeps_its_file_readable(tmp_path: Path) -> None:
    with Model(write_gguf(tmp_path / "m.gguf", NUMBERS, random_weights(NUMBERS))) as model:
        assert model.file.keys["general.architecture"] == "llama"
        assert {tensor.name for tensor in model.file.tensors} == set(random_weights(NUMBERS))


def test_the_machine_has_cores_and_memory() -> None:
    assert cpu_count() >= 1
    assert read_bandwidth(1, 1 << 22) > 1e8
    with pytest.raises(NativeError, match="threads"):
        read_bandwidth(0)
