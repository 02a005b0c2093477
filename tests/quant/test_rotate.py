"""Does a rotated model compute the same function, in every family?

What rotations are held to, here and elsewhere (a name in brackets is one of these files):

T1 matrices: orthogonal to 1e-12, entries of one size, H H^T = n I in integers for every base order
   [test_hadamard] test_base_matrices_are_hadamard_in_integers, test_transform_of_every_model_size
   [test_optrot] test_random_orthogonal_matrices_are_orthogonal_and_their_own, test_the_objective_falls_with_every_step
   [test_procrustes] test_the_optimum_is_a_rotation_and_the_same_for_any_number_of_threads
T2 the fast transform is the dense one, float64 and float32, in torch and in C
   [test_hadamard] test_transform_is_the_dense_kronecker_product, test_transform_of_every_model_size
   [native/test_hadamard] test_equals_the_offline_transform, test_the_transpose_turns_back
T3 the function stays: 1e-10 of the largest logit in float64, 1e-5 in float32, for every family, placement and kind;
   tokens go to the same experts
   test_rotated_model_computes_the_same_function; the same in [test_rotate_sparse] for experts and latent attention
   [test_rotate_placements] test_a_tied_head_keeps_its_basis, test_even_norms_allow_rotations_of_pairs,
   test_gains_that_lack_one_are_whole_when_opened
   [test_rotation_search] test_the_function_stays; [test_rotate_sparse] test_dense_rotations_keep_the_function
T4 what is wrong is noticed: every matrix, bias, gain and end that one rotation misses, in every family
   [test_rotate_negatives] test_whatever_a_rotation_misses_is_noticed
   [test_rotate_placements] test_a_tied_head_keeps_its_basis, test_queries_and_keys_turn_alike
   [test_rotate_sparse] test_a_router_that_was_forgotten_chooses_other_experts, test_the_oracle_notices_a_wrong_table
T5 every tensor is what the algebra says, and what is written is that tensor as F32
   [test_rotate_tensors] test_every_tensor_is_what_the_algebra_says
T6 unmodified llama.cpp: a rotated F32 file says what the plain one says
   [peer/test_rotation] test_llama_cpp_runs_a_rotated_model_as_the_plain_one
T7 traces stay when second moments move, and a Hadamard makes their diagonals flat
   test_statistics_move_with_the_basis; [test_rotate_tensors] test_traces_stay_when_statistics_move,
   test_a_hadamard_spreads_a_massive_direction
T8 quantized canaries: perplexities of rotated and rounded models stay what they were
   [test_rotate_canary] test_perplexities_stay
T9 online rotations: with float weights they cancel, with quantized ones they are the decoded reference
   test_online_rotation_is_left_to_the_runtime
   [native/test_model] test_online_rotations_of_hidden_cancel_rotated_columns,
   test_online_rotations_before_quantized_columns, test_online_rotations_of_queries_change_nothing,
   test_online_rotations_of_the_boundary_keep_the_ends
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.families import FAMILIES
from rondel.converters.family import OUTPUT, OUTPUT_NORM, Norm, block_tensor
from rondel.converters.output import StageOutput
from rondel.converters.stats import Stats, open_stats, site_tensor
from rondel.quant.hadamard import rotate_channels
from rondel.quant.reference import reference_logits
from rondel.quant.rotate import RotateConfig, plan, rotate
from rondel.quant.rotated_view import RotatedView
from rondel.quant.rotator import Rotator
from tests.tiny import tiny_model

# Largest difference of logits, relative to the largest logit. The first is the arithmetic's own (weights kept in
# float64); the second what storing weights as F32 costs; the third float32 arithmetic.
EXACT = 1e-10
STORED_F32 = 2e-6
FLOAT32 = 1e-5
# What a forgotten piece must at least change: it is a wrong model, not a rounding error.
BROKEN = 0.05

MODELS = {
    "llama": {
        "family": "llama",
        "attention_bias": True,
        "kv_heads": 2,
        "heads": 6,
        "head_dim": 16,
        "width": 48,
        "hidden": 80,
    },
    "llama-tied": {"family": "llama", "tied": True},
    "qwen2": {"family": "qwen2", "tied": True, "heads": 6, "kv_heads": 2, "width": 96},
    "qwen3": {"family": "qwen3", "heads": 6, "kv_heads": 2, "head_dim": 24, "width": 40, "hidden": 172},
    "qwen3-tied": {"family": "qwen3", "tied": True},
}
ROTATIONS = {
    "residual": RotateConfig(heads=False),
    "heads": RotateConfig(residual=False),
    "hidden": RotateConfig(residual=False, heads=False, hidden="full", target="rondel"),
    "queries": RotateConfig(residual=False, heads=False, queries=8, target="rondel"),
    "rope_pairs": RotateConfig(residual=False, heads=False, rope_pairs=True),
    "all": RotateConfig(rotate="always", hidden=4, queries="full", target="rondel", seed=3),
}
TOKENS = torch.randint(0, 288, (24,), generator=torch.Generator().manual_seed(5))


def test_the_list_names_tests_that_exist():
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))
    named = set(re.findall(r"(?<!/)\b(test_\w+)\b(?!\])", __doc__))
    assert len(named) > 20
    assert {name for name in named if f"def {name}(" not in text} == set()
    files = set(re.findall(r"\[([\w/]+)\]", __doc__))
    assert all(list(Path(__file__).parents[1].rglob(f"{file}.py")) for file in files)


def model(name: str, folder: Path) -> Checkpoint:
    settings = dict(MODELS[name])
    return open_checkpoint(tiny_model(settings.pop("family"), folder / name, **settings))


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


class Patched(Checkpoint):
    """A checkpoint with some tensors replaced in memory."""

    def __init__(self, source: Checkpoint, tensors: dict[str, torch.Tensor], **manifest: object) -> None:
        entries = {
            **source.manifest["tensors"],
            **{n: {"shape": list(t.shape), "format": "F32", "shard": "", "sha256": ""} for n, t in tensors.items()},
        }
        super().__init__(source.root, {**source.manifest, **manifest, "tensors": entries})
        self._source, self._replaced = source, tensors

    def read(self, name: str) -> torch.Tensor:
        return self._replaced[name] if name in self._replaced else self._source.read(name)


def rotated_weights(source: Checkpoint, rotation: str) -> list[str]:
    """Weights that a rotation must have changed."""
    roles = {
        "residual": ["attn_q", "attn_output", "ffn_gate", "ffn_down"],
        "heads": ["attn_v", "attn_output"],
        "hidden": ["ffn_down"],
        "queries": [],
        "rope_pairs": ["attn_q", "attn_k"],
    }
    fused = {role for which, some in roles.items() if which != "rope_pairs" for role in some}
    wanted = roles[rotation] if rotation in roles else sorted(fused)
    return [block_tensor(layer, role) for layer in range(source.numbers.layers) for role in wanted]


@pytest.mark.parametrize(
    ("name", "rotation"),
    # Qwen3's norms in front of RoPE allow no rotation of its pairs.
    [(name, which) for name in MODELS for which in ROTATIONS if which != "rope_pairs" or "qwen3" not in name],
)
def test_rotated_model_computes_the_same_function(name, rotation, tmp_path):
    source, config = model(name, tmp_path), ROTATIONS[rotation]
    expected = reference_logits(source, TOKENS)
    assert difference(reference_logits(RotatedView(source, config), TOKENS), expected) < EXACT
    rotated = rotate(source, tmp_path / "rotated", config)
    assert difference(reference_logits(rotated, TOKENS), expected) < STORED_F32
    assert difference(reference_logits(rotated, TOKENS, torch.float32), expected) < FLOAT32
    assert not any(torch.equal(rotated.read(n), source.read_float(n)) for n in rotated_weights(source, rotation))


def test_gains_are_ones_and_the_head_is_its_own(tmp_path):
    source = model("qwen3-tied", tmp_path)
    rotated = rotate(source, tmp_path / "rotated", RotateConfig())
    assert rotated.read(OUTPUT_NORM).eq(1).all()
    assert rotated.read("blk.1.ffn_norm.weight").eq(1).all()
    assert torch.equal(rotated.read("blk.0.attn_q_norm.weight"), source.read("blk.0.attn_q_norm.weight"))
    assert OUTPUT in rotated
    assert not rotated.numbers.tied
    assert not torch.equal(rotated.read(OUTPUT), rotated.read("token_embd.weight"))
    assert "target" not in rotated.manifest  # fused rotations run everywhere
    assert rotated.stages[-1]["name"] == "rotate"
    heads_only = rotate(source, tmp_path / "heads", RotateConfig(residual=False))
    assert OUTPUT not in heads_only
    assert heads_only.numbers.tied


def test_online_rotation_is_left_to_the_runtime(tmp_path):
    source = model("llama", tmp_path)
    rotated = rotate(source, tmp_path / "rotated", ROTATIONS["hidden"])
    assert rotated.manifest["target"] == "rondel"
    (record,) = rotated.rotations
    assert (record.site, record.online, record.size, record.block) == ("hidden", True, 80, 80)
    undone = Patched(rotated, {}, rotations=[])
    expected = reference_logits(source, TOKENS)
    assert difference(reference_logits(undone, TOKENS), expected) > BROKEN
    # The fused half alone: rotating the hidden rows by hand and ffn_down offline is the identity on their product.
    name = block_tensor(0, "ffn_down")
    hidden = torch.randn(7, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = rotate_channels(hidden, record) @ rotated.read_float(name, torch.float64).T
    assert difference(turned, hidden @ source.read_float(name, torch.float64).T) < STORED_F32


def test_refusals(tmp_path, monkeypatch):
    source = model("qwen3", tmp_path)
    out = tmp_path / "out"
    with pytest.raises(RondelError, match="online"):
        rotate(source, out, RotateConfig(hidden="full"))
    with pytest.raises(RondelError, match="divide"):
        rotate(source, out, RotateConfig(hidden=16, target="rondel"))
    with pytest.raises(RondelError, match="order 43"):
        rotate(source, out, RotateConfig(hidden=43, target="rondel"))
    with pytest.raises(RondelError, match="nothing to rotate"):
        rotate(source, out, RotateConfig(residual=False, heads=False))
    with pytest.raises(RondelError, match=r"--queries.* online"):
        rotate(source, out, RotateConfig(queries="full"))
    with pytest.raises(RondelError, match="blocks of 16 do not divide the 24 query channels"):
        rotate(source, out, RotateConfig(queries=16, target="rondel"))
    with pytest.raises(RondelError, match=r"--keep-tied.* online"):
        rotate(source, out, RotateConfig(keep_tied=True))
    with pytest.raises(RondelError, match="the head has a matrix of its own"):
        rotate(source, out, RotateConfig(keep_tied=True, target="rondel"))
    with pytest.raises(RondelError, match="too late"):
        rotate(Patched(source, {}, target="rondel"), out, RotateConfig(target="llama.cpp"))
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
    rotated = rotate(source, out, RotateConfig())
    with pytest.raises(RondelError, match="rotated already"):
        rotate(rotated, tmp_path / "twice", RotateConfig())
    sandwich = dataclasses.replace(
        source.family, norms=(*source.family.norms, Norm("post_norm", "post", "residual", None, "width"))
    )
    monkeypatch.setitem(FAMILIES, "qwen3", sandwich)
    with pytest.raises(RondelError, match="post_norm stands between"):
        rotate(source, tmp_path / "sandwich", RotateConfig())


def folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def test_same_bytes_for_any_threads_and_after_an_interruption(tmp_path, monkeypatch):
    source = model("qwen2", tmp_path)
    config = RotateConfig(hidden="full", target="rondel")
    rotate(source, tmp_path / "one", config, threads=1)
    expected = folder_hash(tmp_path / "one")
    rotate(source, tmp_path / "three", config, threads=3)
    assert folder_hash(tmp_path / "three") == expected

    def stop(done: int, total: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rotate(source, tmp_path / "stopped", config, progress=stop)
    assert not (tmp_path / "stopped").exists()
    rotate(source, tmp_path / "stopped", config)
    assert folder_hash(tmp_path / "stopped") == expected
    monkeypatch.setattr(Rotator, "tensor", None)
    rotate(source, tmp_path / "stopped", config)  # nothing left to do


def test_plan_tells_the_size(tmp_path):
    source = model("qwen3-tied", tmp_path)
    told = json.loads(json.dumps(plan(source, RotateConfig())))
    rotated = rotate(source, tmp_path / "rotated", RotateConfig())
    assert told["tensor_bytes"] == sum(4 * rotated.read(name).numel() for name in rotated.names())
    assert told["unties_head"]
    assert [(r["site"], r["block"]) for r in told["rotations"]] == [("residual", 64), ("heads", 32)]


def write_stats(source: Checkpoint, out: Path, *, full: bool = True) -> Stats:
    """Second moments of random vectors for every site; no calibration needed."""
    output = StageOutput(out, {"name": "calibrate"})
    generator = torch.Generator().manual_seed(2)
    numbers, sites = source.numbers, {"attn_in": "width", "heads": "queries", "ffn_in": "width", "hidden": "hidden"}
    places = [(layer, site, size) for layer in range(numbers.layers) for site, size in sites.items()]
    tensors = {}
    for layer, site, size in [*places, (None, "output_in", "width")]:
        x = torch.randn(3000, numbers.size(size), generator=generator, dtype=torch.float64).exp()
        moment = (x.T @ x / len(x)).float()
        tensors[site_tensor(layer, site, "diagonal")] = moment.diagonal().clone()
        tensors[site_tensor(layer, site, "absmax")] = x.abs().amax(0).float()
        tensors[site_tensor(layer, site, "count")] = torch.tensor([3000.0])
        if full:
            tensors[site_tensor(layer, site, "second_moment")] = moment
    output.write("all", tensors)
    manifest = {key: value for key, value in source.carried().items() if key != "stages"}
    output.finish(["all"], {**manifest, "kind": "stats", "calibration": {"tokens": 3000}, "stages": [output.stage]})
    return open_stats(out)


def test_statistics_move_with_the_basis(tmp_path):
    source = model("llama", tmp_path)
    stats = write_stats(source, tmp_path / "stats")
    rotated = rotate(source, tmp_path / "rotated", ROTATIONS["all"], stats)
    moved = open_stats(tmp_path / "rotated")
    moved.check_basis(rotated)
    with pytest.raises(RondelError, match="another basis"):
        stats.check_basis(rotated)
    # tr(W H W^T), the energy of a layer's output, is the same in both bases.
    places = [("attn_in", "attn_q"), ("attn_in", "attn_v"), ("heads", "attn_output"), ("hidden", "ffn_down")]
    pairs = [(layer, site, block_tensor(layer, role)) for layer in range(2) for site, role in places]
    for layer, site, name in [*pairs, (None, "output_in", OUTPUT)]:
        before, after = stats.second_moment(layer, site).double(), moved.second_moment(layer, site).double()
        weight, turned = source.read_float(name, torch.float64), rotated.read_float(name, torch.float64)
        energy = torch.trace(weight @ before @ weight.T)
        assert abs(torch.trace(turned @ after @ turned.T) / energy - 1) < STORED_F32, name
        assert torch.equal(moved.diagonal(layer, site), after.diagonal().float())
        assert torch.equal(after, after.T)
        assert not moved.has(layer, site, "absmax")
        assert moved.count(layer, site) == 3000


def test_only_diagonals_do_not_move(tmp_path):
    source = model("llama", tmp_path)
    stats = write_stats(source, tmp_path / "stats", full=False)
    with pytest.raises(RondelError, match="only diagonals"):
        rotate(source, tmp_path / "rotated", RotateConfig(), stats)
    other = model("llama-tied", tmp_path)
    with pytest.raises(RondelError, match="another model"):
        rotate(other, tmp_path / "rotated", RotateConfig(), write_stats(source, tmp_path / "full"))
