"""A tiny random model of each family: its weights, a GGUF writer for them, and the forward pass in float64 numpy."""

from __future__ import annotations

import base64
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from rondel.quant.activation_rounding import PLACES, round_activations

Array = NDArray[Any]
Tensors = dict[str, Array]

ATTENTION, FFN, BLOCK = 1, 2, 3  # bits of step.parts
NONE, SUM, MEAN, WEIGHTED_SUM = range(4)  # group.merge
KINDS = {
    "gate_attn": 1,
    "gate_ffn": 2,
    "attn_norm_gain": 3,
    "ffn_norm_gain": 4,
    "attn_out_gain": 5,
    "ffn_out_gain": 6,
    "attn_out_bias": 7,
    "ffn_out_bias": 8,
    "q_head_gain": 9,
    "hidden_gain": 10,
    "act_scale": 16,
    "act_clip": 17,
    "act_bits": 18,
    "rounding": 19,
    "rotation_seed": 20,
}
ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
KINDS |= {f"{role}_{half}": 32 + 2 * i + j for i, role in enumerate(ROLES) for j, half in enumerate(("left", "right"))}
WHOLE = ("act_bits", "rounding", "rotation_seed")  # int16, the others float16


@dataclass(frozen=True)
class Numbers:
    """What the file's hyperparameter keys say; small enough that float64 numpy takes milliseconds."""

    family: str = "llama"
    layers: int = 3
    width: int = 32
    hidden: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    vocabulary: int = 60
    context: int = 64
    epsilon: float = 1e-5
    rope_base: float = 10000.0
    rope_factor: float = 1.0  # of linear scaling
    tied: bool = False
    biases: bool = False
    rope_factors: bool = False  # a tensor rope_freqs.weight

    @property
    def head_norms(self) -> bool:
        return self.family == "qwen3"


@dataclass(frozen=True)
class Step:
    """One execution of a layer, as the replication keys describe it."""

    layer: int
    number: int = 0  # the pass
    parts: int = BLOCK
    group: int = 0
    kv: int = 0
    parameters: dict[str, Array] = field(default_factory=dict)


def random_weights(numbers: Numbers, seed: int = 0) -> Tensors:
    """Float32 tensors in (rows, cols) order; gains far from 1 and biases far from 0, so that each one matters."""
    generator = np.random.default_rng(seed)
    queries, keys = numbers.heads * numbers.head_dim, numbers.kv_heads * numbers.head_dim
    tensors: Tensors = {}

    def matrix(name: str, rows: int, cols: int, scale: float = 1.0) -> None:
        tensors[f"{name}.weight"] = scale * generator.standard_normal((rows, cols)) / np.sqrt(cols)

    def vector(name: str, size: int, spread: float, centre: float = 0.0) -> None:
        tensors[name] = centre + spread * generator.standard_normal(size)

    matrix("token_embd", numbers.vocabulary, numbers.width, scale=4)
    for i in range(numbers.layers):
        vector(f"blk.{i}.attn_norm.weight", numbers.width, 0.3, 1)
        vector(f"blk.{i}.ffn_norm.weight", numbers.width, 0.3, 1)
        if numbers.head_norms:
            vector(f"blk.{i}.attn_q_norm.weight", numbers.head_dim, 0.3, 1)
            vector(f"blk.{i}.attn_k_norm.weight", numbers.head_dim, 0.3, 1)
        for role, rows in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
            matrix(f"blk.{i}.{role}", rows, numbers.width, scale=2)
            if numbers.biases:
                vector(f"blk.{i}.{role}.bias", rows, 0.5)
        matrix(f"blk.{i}.attn_output", numbers.width, queries)
        matrix(f"blk.{i}.ffn_gate", numbers.hidden, numbers.width, scale=2)
        matrix(f"blk.{i}.ffn_up", numbers.hidden, numbers.width)
        matrix(f"blk.{i}.ffn_down", numbers.width, numbers.hidden)
    vector("output_norm.weight", numbers.width, 0.3, 1)
    if not numbers.tied:
        matrix("output", numbers.vocabulary, numbers.width, scale=3)
    if numbers.rope_factors:
        tensors["rope_freqs.weight"] = 1 + generator.random(numbers.head_dim // 2) * 7
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def add_hyperparameters(writer: gguf.GGUFWriter, numbers: Numbers) -> None:
    writer.add_block_count(numbers.layers)
    writer.add_context_length(numbers.context)
    writer.add_embedding_length(numbers.width)
    writer.add_feed_forward_length(numbers.hidden)
    writer.add_head_count(numbers.heads)
    writer.add_head_count_kv(numbers.kv_heads)
    writer.add_key_length(numbers.head_dim)
    writer.add_value_length(numbers.head_dim)
    writer.add_layer_norm_rms_eps(numbers.epsilon)
    writer.add_rope_freq_base(numbers.rope_base)
    if numbers.rope_factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(numbers.rope_factor)


def write_gguf(
    path: Path,
    numbers: Numbers,
    tensors: Tensors,
    keys: dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]] | None = None,
    quantized: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """A GGUF file of these tensors; matrices in the type `quantized`, else as they are."""
    writer = gguf.GGUFWriter(path, numbers.family)
    add_hyperparameters(writer, numbers)
    for name, (value, kind, element) in (keys or {}).items():
        writer.add_key_value(name, value, kind, sub_type=element)
    for name, tensor in tensors.items():
        if quantized is not None and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain_steps(layers: int) -> list[Step]:
    return [Step(i, group=i, kv=i) for i in range(layers)]


def number_steps(steps: list[Step]) -> list[Step]:
    """Consecutive groups and KV slots of their own for serial steps."""
    return [replace(step, group=i, kv=i) for i, step in enumerate(steps)]


def replication_keys(layers: int, steps: list[Step], merges: list[int]) -> dict[str, Any]:
    """The keys of formats.md §4, no parameter sparse."""
    kinds: list[int] = []
    encodings: list[int] = []
    offsets: list[int] = []
    lengths: list[int] = []
    first, sets, payload = [0], [], b""
    for step in steps:
        for name, values in step.parameters.items():
            halves = np.atleast_1d(values).astype("<i2" if name in WHOLE else "<f2").reshape(-1)
            kinds.append(KINDS[name])
            encodings.append(2 if name in WHOLE else 0)
            offsets.append(len(payload) // 2)
            lengths.append(len(halves))
            payload += halves.tobytes()
        sets.append(len(first) if step.parameters else 0)
        if step.parameters:
            first.append(len(kinds))
    types = gguf.GGUFValueType

    def array(values: list[int], element: gguf.GGUFValueType) -> Any:
        return values, types.ARRAY, element

    keys = {
        "version": array([1, 0, 0], types.UINT32),
        "n_base": (layers, types.UINT32, None),
        "step.layer": array([s.layer for s in steps], types.UINT32),
        "step.pass": array([s.number for s in steps], types.UINT8),
        "step.parts": array([s.parts for s in steps], types.UINT8),
        "step.group": array([s.group for s in steps], types.UINT32),
        "step.kv": array([s.kv for s in steps], types.INT32),
        "step.pset": array(sets, types.UINT32),
        "group.merge": array(merges, types.UINT8),
        "pset.first": array(first, types.UINT32),
        "payload": (base64.b64encode(payload).decode(), types.STRING, None),
    }
    if kinds:  # the gguf package cannot write empty arrays
        keys |= {
            "ent.kind": array(kinds, types.UINT8),
            "ent.enc": array(encodings, types.UINT8),
            "ent.off": array(offsets, types.UINT32),
            "ent.len": array(lengths, types.UINT32),
        }
    return {f"rondel.replication.{name}": value for name, value in keys.items()}


def random_bits(size: int, seed: int = 0) -> Array:
    """Signs of `size` channels, a bit each."""
    return np.random.default_rng(seed).integers(0, 256, (size + 7) // 8).astype(np.uint8)


def rotation_keys(site: str, size: int, block: int | None = None, index: int = 0, **changes: Any) -> dict[str, Any]:
    """The keys of formats.md §3 for an online rotation, the last one; its signs are `random_bits(size, index)`."""
    types = gguf.GGUFValueType
    keys = {
        "site": (site, types.STRING, None),
        "kind": ("hadamard", types.STRING, None),
        "online": (True, types.BOOL, None),
        "size": (size, types.UINT32, None),
        "block": (block or size, types.UINT32, None),
        "signs": (random_bits(size, index).tolist(), types.ARRAY, types.UINT8),
    } | changes
    return {"rondel.rotation.count": (index + 1, types.UINT32, None)} | {
        f"rondel.rotation.{index}.{name}": value for name, value in keys.items()
    }


def _norm(x: Array, weight: Array, epsilon: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def _turn(x: Array, numbers: Numbers, factors: Array | None) -> Array:
    """RoPE on (tokens, heads, head_dim)."""
    pairs = numbers.head_dim // 2
    frequencies = numbers.rope_base ** (-np.arange(pairs) / pairs) / numbers.rope_factor
    if factors is not None:
        frequencies = frequencies / factors
    angles = np.arange(len(x))[:, None, None] * frequencies
    cosine, sine = np.cos(angles), np.sin(angles)
    out = np.empty_like(x)
    first, second = (np.s_[..., 0::2], np.s_[..., 1::2])
    if numbers.family != "llama":
        first, second = np.s_[..., :pairs], np.s_[..., pairs:]
    out[first] = x[first] * cosine - x[second] * sine
    out[second] = x[first] * sine + x[second] * cosine
    return out


def forward(numbers: Numbers, weights: Tensors, tokens: list[int], steps: list[Step], merges: list[int]) -> Array:
    """Logits (tokens, vocabulary) in float64."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    x = tensors["token_embd.weight"][tokens]
    cache: dict[int, tuple[Array, Array]] = {}
    for group in dict.fromkeys(step.group for step in steps):
        members = [step for step in steps if step.group == group]
        changes = [_block(numbers, tensors, x, step, cache) - x for step in members]
        x = x + sum(changes) / (len(members) if merges[group] == MEAN else 1)
    x = _norm(x, tensors["output_norm.weight"], numbers.epsilon)
    return x @ tensors.get("output.weight", tensors["token_embd.weight"]).T


def _block(numbers: Numbers, tensors: Tensors, x: Array, step: Step, cache: dict[int, tuple[Array, Array]]) -> Array:
    n, head_dim = len(x), numbers.head_dim
    given = {name: np.asarray(value, np.float16).astype(np.float64) for name, value in step.parameters.items()}

    def tensor(role: str) -> Array:
        return tensors[f"blk.{step.layer}.{role}.weight"]

    def linear(role: str, y: Array) -> Array:
        values = {name: np.atleast_1d(value) for name, value in given.items()}
        y = round_activations(torch.from_numpy(y), values, step.layer, PLACES[role], np.arange(n)).numpy()
        term = y @ given[f"{role}_right"].T @ given[f"{role}_left"].T if f"{role}_left" in given else 0.0
        return y @ tensor(role).T + tensors.get(f"blk.{step.layer}.{role}.bias", 0.0) + term

    def heads(role: str, count: int, y: Array) -> Array:
        z = linear(f"attn_{role}", y).reshape(n, count, head_dim)
        if numbers.head_norms:
            z = _norm(z, tensor(f"attn_{role}_norm"), numbers.epsilon)
        return _turn(z, numbers, tensors.get("rope_freqs.weight"))

    if step.parts & ATTENTION:
        y = _norm(x, tensor("attn_norm"), numbers.epsilon) * given.get("attn_norm_gain", 1.0)
        q = heads("q", numbers.heads, y) * given.get("q_head_gain", np.ones(numbers.heads))[:, None]
        if step.kv not in cache:
            cache[step.kv] = heads("k", numbers.kv_heads, y), linear("attn_v", y).reshape(n, -1, head_dim)
        k, v = (np.repeat(z, numbers.heads // numbers.kv_heads, axis=1) for z in cache[step.kv])
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim)
        scores += np.triu(np.full((n, n), -np.inf), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(n, -1)
        change = linear("attn_output", mixed) * given.get("attn_out_gain", 1.0) + given.get("attn_out_bias", 0.0)
        x = x + given.get("gate_attn", 1.0) * change
    if step.parts & FFN:
        y = _norm(x, tensor("ffn_norm"), numbers.epsilon) * given.get("ffn_norm_gain", 1.0)
        gate = linear("ffn_gate", y)
        hidden = gate / (1 + np.exp(-gate)) * linear("ffn_up", y) * given.get("hidden_gain", 1.0)
        change = linear("ffn_down", hidden) * given.get("ffn_out_gain", 1.0) + given.get("ffn_out_bias", 0.0)
        x = x + given.get("gate_ffn", 1.0) * change
    return x


def _low_rank_terms(numbers: Numbers, rank: int) -> dict[str, Array]:
    """One of every linear."""
    queries, keys = numbers.heads * numbers.head_dim, numbers.kv_heads * numbers.head_dim
    width, hidden = numbers.width, numbers.hidden
    sizes = {
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_gate": (hidden, width),
        "ffn_up": (hidden, width),
        "ffn_down": (width, hidden),
    }
    terms = {}
    for role, (rows, channels) in sizes.items():
        terms |= {f"{role}_left": np.full((rows, rank), 0.125), f"{role}_right": np.full((rank, channels), 0.25)}
    return terms


def write_everything(path: Path) -> Path:
    """A small file that uses every online rotation and replication, of which most bytes are header: for the fuzzer."""
    numbers = Numbers("qwen3", layers=2, width=24, hidden=36, tied=True)
    gates: dict[str, Array] = {"gate_attn": np.ones(1), "gate_ffn": np.ones(1)}
    rounded = {"act_scale": [1.0], "act_clip": [0.875], "act_bits": [4], "rounding": [7], "rotation_seed": [3]}
    steps = [
        Step(0, group=0, kv=0),
        Step(1, group=1, kv=1),  # beside two copies: one on its keys and values, one on its own
        Step(1, 1, group=1, kv=1, parameters=gates),
        Step(1, 2, group=1, kv=2, parameters={**gates, **rounded, **_low_rank_terms(numbers, 1)}),
        Step(0, 1, group=2, kv=3, parameters={**gates, **_low_rank_terms(numbers, 2), "ffn_out_bias": np.ones(24)}),
    ]
    keys = rotation_keys("boundary", 24) | rotation_keys("queries", 8, index=1) | rotation_keys("hidden", 36, 12, 2)
    keys |= replication_keys(2, steps, [NONE, MEAN, NONE])
    return write_gguf(path, numbers, random_weights(numbers), keys)


if __name__ == "__main__":
    write_everything(Path(sys.argv[1]))
