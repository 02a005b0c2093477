"""Is every rotated tensor what the algebra says, written out with dense matrices, and what statistics must keep?"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.output import StageOutput
from rondel.converters.rotation import HADAMARD, Rotation
from rondel.converters.stats import Stats, open_stats, site_tensor
from rondel.quant.hadamard import random_signs, rotate_channels
from rondel.quant.orthogonal import random_orthogonal, with_matrix
from rondel.quant.rotate import RotateConfig, rotate
from rondel.quant.rotated_stats import move_second_moment
from rondel.quant.rotated_view import RotatedView
from rondel.quant.workers import Workers
from tests.quant.test_rotate import EXACT, STORED_F32, difference
from tests.quant.test_rotate import MODELS as DENSE_MODELS
from tests.quant.test_rotate import model as dense_model
from tests.tiny_sparse import MODELS, tiny_sparse_model

CONFIG = RotateConfig(rotate="always", hidden="full", seed=9, target="rondel")
UNNORMED = ("llama", "qwen2", "deepseek2", "deepseek2-lite", "deepseek3")  # nothing between q or k and RoPE
HIDDEN = {"hidden": "hidden", "hidden_experts": "expert_hidden", "hidden_shared": "shared_hidden"}  # their sizes
MASSIVE = 1000.0  # one channel's size beside the others'
FLAT, ORTHOGONAL_FLAT = (
    3.0,
    4.0,
)  # for a direction as one-sided as that; 2 ln n is what the largest entry comes to on average
SAMPLES = 400  # random vectors behind the second moments


def model(name: str, folder: Path) -> Checkpoint:
    return open_checkpoint(tiny_sparse_model(name, folder / name)) if name in MODELS else dense_model(name, folder)


class Algebra:
    """The rotated tensors of a model, by dense matrices: x -> x R at every site, columns W R, rows R^T W."""

    def __init__(self, source: Checkpoint, rotated: Checkpoint) -> None:
        self.source, self.numbers = source, source.numbers
        self.dense = {
            found.site: rotate_channels(torch.eye(found.size, dtype=torch.float64), found)
            for found in rotated.read_rotations()
        }
        self.stream, self.heads = self.dense["residual"], self.dense["heads"]

    def read(self, name: str) -> torch.Tensor:
        return self.source.read_float(name, torch.float64)

    def values(self) -> torch.Tensor:
        """Of the value heads: that of the first query head in each group."""
        group, size = self.numbers.heads // self.numbers.kv_heads, self.numbers.value_dim
        starts = range(0, self.numbers.heads * size, group * size)
        return torch.block_diag(*(self.heads[first : first + size, first : first + size] for first in starts))

    def queries(self) -> torch.Tensor | None:
        """Of the query heads' RoPE: that of the key head which each of them meets."""
        planes, size = self.dense.get("rope_pairs"), self.numbers.rope_dim
        if planes is None:
            return None
        group = self.numbers.heads // self.numbers.key_heads
        starts = [head // group * size for head in range(self.numbers.heads)]
        return torch.block_diag(*(planes[first : first + size, first : first + size] for first in starts))

    def blocks(self, first: torch.Tensor | None, size: int, second: torch.Tensor | None, other: int) -> torch.Tensor:
        """Of heads that hold two parts in turn, each the block that its site has for the head, or the identity."""
        made = []
        for head in range(self.numbers.heads):
            for found, width in ((first, size), (second, other)):
                part = slice(head * width, (head + 1) * width)
                made.append(torch.eye(width, dtype=torch.float64) if found is None else found[part, part])
        return torch.block_diag(*made)

    def rows(self, role: str) -> torch.Tensor | None:
        latents = self.numbers.latents
        if role == "attn_output" or "_down" in role:
            return self.stream
        if role == "attn_v":
            return self.values()
        if latents and role in ("attn_q", "attn_q_b"):
            return self.blocks(self.dense["nope"], latents.nope, self.queries(), latents.rope)
        if latents and role == "attn_kv_b":
            return self.blocks(self.dense["nope"], latents.nope, self.values(), latents.values)
        if latents and role == "attn_kv_a_mqa":
            keys = self.dense.get("rope_pairs", torch.eye(latents.rope, dtype=torch.float64))
            return torch.block_diag(self.dense["kv_latent"], keys)
        if role == "attn_q":
            return self.queries()
        if role == "attn_k":
            return self.dense.get("rope_pairs")
        return self.dense["q_latent"] if role == "attn_q_a" else None

    def columns(self, layer: str, role: str) -> torch.Tensor:
        """diag(gain) R of what a matrix reads."""
        if role == "attn_output":
            return self.heads
        if "_down" in role:
            hidden = {"exps": "hidden_experts", "shexp": "hidden_shared"}.get(role.rpartition("_")[2], "hidden")
            return self.dense.get(hidden, torch.eye(self.numbers.size(HIDDEN[hidden]), dtype=torch.float64))
        norm, site = {
            "attn_q_b": ("attn_q_a_norm", "q_latent"),
            "attn_kv_b": ("attn_kv_a_norm", "kv_latent"),
        }.get(role, ("attn_norm" if role.startswith("attn") else "ffn_norm", "residual"))
        return self.read(f"blk.{layer}.{norm}.weight")[:, None] * self.dense[site]

    def expected(self, name: str) -> torch.Tensor:
        if name == "token_embd.weight":
            return self.read(name) @ self.stream
        if name == "output.weight":
            return self.read(self.source.head()) * self.read("output_norm.weight") @ self.stream
        tensor = self.read(name)
        if name == "output_norm.weight":
            return torch.ones_like(tensor)
        if not name.startswith("blk."):
            return tensor
        layer, role = name.split(".")[1:3]
        if role.endswith("norm"):
            return tensor if role in ("attn_q_norm", "attn_k_norm") else torch.ones_like(tensor)
        if role == "exp_probs_b":
            return tensor
        rows = self.rows(role)
        if name.endswith(".bias"):
            return tensor if rows is None else tensor @ rows
        turned = tensor @ self.columns(layer, role)
        return turned if rows is None else rows.T @ turned


ORTHOGONAL = RotateConfig(kind="orthogonal", seed=9, target="rondel")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, replace(CONFIG, rope_pairs=name in UNNORMED)) for name in (*DENSE_MODELS, *MODELS)),
        *((name, ORTHOGONAL) for name in ("qwen3", "deepseek3")),
    ],
)
def test_every_tensor_is_what_the_algebra_says(name, config, tmp_path):
    source = model(name, tmp_path)
    rotated = RotatedView(source, config)
    algebra = Algebra(source, rotated)
    assert set(rotated.names()) >= set(source.names())
    written = rotate(source, tmp_path / "rotated", config, threads=1)
    assert set(written.names()) == set(rotated.names())
    for tensor in rotated.names():
        found = rotated.read(tensor)
        assert difference(found, algebra.expected(tensor)) < EXACT, tensor
        assert torch.equal(written.read(tensor), found.to(torch.float32)), tensor


def write_stats(source: Checkpoint, out: Path) -> Stats:
    """Second moments of random vectors at every site that exists; experts have none yet."""
    output, numbers = StageOutput(out, {"name": "calibrate"}), source.numbers
    generator, tensors = torch.Generator().manual_seed(2), {}
    places: dict[tuple[int | None, str], int] = {(None, "output_in"): numbers.width}
    for layer in range(numbers.layers):
        readers = [one for one in source.family.linears if one.is_in(layer, numbers) and not one.expert]
        places |= {(layer, one.reads): numbers.size(one.cols) for one in readers}
    for (layer, site), size in places.items():
        x = torch.randn(SAMPLES, size, generator=generator, dtype=torch.float64).exp()
        moment = (x.T @ x / SAMPLES).float()
        tensors[site_tensor(layer, site, "second_moment")] = moment
        tensors[site_tensor(layer, site, "diagonal")] = moment.diagonal().clone()
        tensors[site_tensor(layer, site, "count")] = torch.tensor([float(SAMPLES)])
    output.write("all", tensors)
    manifest = {key: value for key, value in source.carried().items() if key != "stages"}
    output.finish(["all"], {**manifest, "kind": "stats", "calibration": {"tokens": SAMPLES}, "stages": [output.stage]})
    return open_stats(out)


@pytest.mark.parametrize("name", ["qwen3", "qwen3moe", "deepseek2", "deepseek2-lite", "deepseek3"])
def test_traces_stay_when_statistics_move(name, tmp_path):
    source = model(name, tmp_path)
    stats = write_stats(source, tmp_path / "stats")
    rotated = rotate(source, tmp_path / "rotated", CONFIG, stats)
    moved = open_stats(tmp_path / "rotated")
    sites = set()
    for weight in rotated.names():
        linear = source.family.linear_of(weight)
        if linear is None or linear.expert or not weight.endswith(".weight"):
            continue
        layer, site = int(weight.split(".")[1]), linear.reads
        before, after = (found.second_moment(layer, site).double() for found in (stats, moved))
        old, new = source.read_float(weight, torch.float64), rotated.read_float(weight, torch.float64)
        # tr(W H W^T) is the energy of what the matrix writes, whatever the basis and the gain in front of it.
        energy = torch.trace(old @ before @ old.T)
        assert abs(torch.trace(new @ after @ new.T) / energy - 1) < STORED_F32, weight
        norm = source.family.norm_making(site)
        if norm is not None:  # a folded gain scales what is seen; a rotation alone keeps the trace
            gain = source.read_float(f"blk.{layer}.{norm.role}.weight", torch.float64)
            before = before / gain / gain[:, None]
        assert abs(torch.trace(after) / torch.trace(before) - 1) < STORED_F32, weight
        sites.add(site)
    assert sites == {one.reads for one in source.family.linears if not one.expert and _exists(source, one.reads)}


def _exists(source: Checkpoint, site: str) -> bool:
    readers = (one for one in source.family.readers(site) if not one.expert)
    return any(one.is_in(layer, source.numbers) for one in readers for layer in range(source.numbers.layers))


@pytest.mark.parametrize("seed", range(4))
def test_a_hadamard_spreads_a_massive_direction(seed: int) -> None:
    """The largest mean square over the mean one: of a Hadamard 3 at most, of a random orthogonal matrix 2 ln n."""
    size = 512
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2048, size, generator=generator, dtype=torch.float64)
    x[:, int(torch.randint(0, size, (), generator=generator))] *= MASSIVE
    moment = x.T @ x / len(x)
    hadamard = Rotation("residual", HADAMARD, False, size, size, random_signs(size, seed, "residual"))
    dense = with_matrix(hadamard, random_orthogonal(1, size, seed, "residual"))
    flatness = {}
    with Workers(1) as workers:
        for kind, rotation in {"hadamard": hadamard, "orthogonal": dense}.items():
            moved = move_second_moment(moment, rotation, None, workers)
            assert abs(moved.trace() / moment.trace() - 1) < EXACT
            flatness[kind] = float(moved.diagonal().max() / moved.diagonal().mean())
    assert float(moment.diagonal().max() / moment.diagonal().mean()) > size / 2
    assert flatness["hadamard"] < FLAT
    assert FLAT < flatness["orthogonal"] < ORTHOGONAL_FLAT * math.log(size)
