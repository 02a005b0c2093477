"""Do rotated models with experts and latent attention compute the same function, and choose the same experts?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.export import ExportConfig, export
from rondel.converters.families import FAMILIES
from rondel.converters.family import Norm
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.replicate import ReplicateConfig, replicate
from rondel.quant.rotate import RotateConfig, rotate
from rondel.quant.rotated_view import RotatedView
from tests.quant.sparse_reference import sparse_logits
from tests.quant.test_rotate import BROKEN, EXACT, FLOAT32, STORED_F32, Patched, difference
from tests.tiny import SMALLEST_TOKENIZER
from tests.tiny_sparse import MODELS, tiny_sparse_model

# transformers' norms, RoPE tables and routers are float32 whatever the model's precision.
FLOAT32_NORMS = 1e-5
TOKENS = torch.randint(0, SMALLEST_TOKENIZER, (24,), generator=torch.Generator().manual_seed(5))
NOTHING = RotateConfig(residual=False, heads=False, latents=False, nope=False, target="rondel")
ROTATIONS = {
    "residual": replace(NOTHING, residual=True),
    "heads": replace(NOTHING, heads=True),
    "latents": replace(NOTHING, latents=True),
    "nope": replace(NOTHING, nope=True),
    "rope_pairs": replace(NOTHING, rope_pairs=True),
    "hidden": replace(NOTHING, hidden="full"),
    "all": RotateConfig(hidden=8, seed=3, target="rondel"),
}
# The weights that a rotation must have changed, where a model has them.
CHANGED = {
    "residual": [
        "attn_q",
        "attn_q_a",
        "attn_kv_a_mqa",
        "attn_output",
        "ffn_gate",
        "ffn_gate_inp",
        "ffn_up_exps.1",
        "ffn_down_exps.2",
        "ffn_gate_shexp",
        "ffn_down_shexp",
    ],
    "heads": ["attn_v", "attn_kv_b", "attn_output"],
    "latents": ["attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b"],
    "nope": ["attn_q", "attn_q_b", "attn_kv_b"],
    "rope_pairs": ["attn_q", "attn_q_b", "attn_kv_a_mqa"],
    "hidden": ["ffn_down", "ffn_down_exps.0", "ffn_down_exps.5", "ffn_down_shexp"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Every model, written once."""
    folder = tmp_path_factory.mktemp("sparse")
    return {name: open_checkpoint(tiny_sparse_model(name, folder / name)) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_the_oracle_computes_what_transformers_computes(name, models):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        models[name].root, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs.double().eval()(TOKENS[None]).logits[0]
    assert difference(sparse_logits(models[name], TOKENS)[0], expected) < FLOAT32_NORMS


def cases() -> list[tuple[str, str]]:
    """Models and the placements that they have."""
    latent = ("latents", "nope", "rope_pairs")  # Qwen3 has norms in front of RoPE
    return [(name, which) for name in MODELS for which in ROTATIONS if "deepseek" in name or which not in latent]


@pytest.mark.parametrize(("name", "which"), cases())
def test_rotated_model_computes_the_same_function(name, which, models, tmp_path):
    source, config = models[name], ROTATIONS[which]
    expected, routes = sparse_logits(source, TOKENS)
    got, chosen = sparse_logits(RotatedView(source, config), TOKENS)
    assert difference(got, expected) < EXACT
    assert torch.equal(chosen, routes)
    rotated = open_checkpoint(rotate(source, tmp_path / "rotated", config).root)
    got, chosen = sparse_logits(rotated, TOKENS)
    assert difference(got, expected) < STORED_F32
    assert torch.equal(chosen, routes)
    assert difference(sparse_logits(rotated, TOKENS, torch.float32)[0], expected) < FLOAT32
    if which == "rope_pairs":
        assert rotated.read_rotations()[0].matrix is not None
    roles = CHANGED.get(which) or sorted({role for some in CHANGED.values() for role in some})
    names = [f"blk.{layer}.{role}.weight" for layer in range(3) for role in roles]
    changed = [weight for weight in names if weight in source]
    assert changed
    assert not any(torch.equal(rotated.read(weight), source.read(weight)) for weight in changed)


@pytest.mark.parametrize("kind", ["orthogonal", "optrot"])
@pytest.mark.parametrize("name", MODELS)
def test_dense_rotations_keep_the_function(name, kind, models):
    source = models[name]
    expected, routes = sparse_logits(source, TOKENS)
    got, chosen = sparse_logits(RotatedView(source, RotateConfig(kind=kind, tries=2)), TOKENS)
    assert difference(got, expected) < EXACT
    assert torch.equal(chosen, routes)


def test_a_tied_head_keeps_its_basis(models):
    source = models["qwen3moe-tied"]
    view = RotatedView(source, RotateConfig(keep_tied=True, target="rondel"))
    expected, routes = sparse_logits(source, TOKENS)
    got, chosen = sparse_logits(view, TOKENS)
    assert difference(got, expected) < EXACT
    assert torch.equal(chosen, routes)


@pytest.mark.parametrize("name", MODELS)
def test_a_router_that_was_forgotten_chooses_other_experts(name, models):
    source = models[name]
    rotated = RotatedView(source, RotateConfig())
    routers = [f"blk.{layer}.ffn_gate_inp.weight" for layer in range(source.numbers.layers)]
    wrong = {router: source.read_float(router, torch.float64) for router in routers if router in source}
    tensors = {tensor: rotated.read(tensor) for tensor in rotated.names()}
    got, chosen = sparse_logits(Patched(rotated, tensors | wrong), TOKENS)
    expected, routes = sparse_logits(source, TOKENS)
    assert difference(got, expected) > BROKEN
    assert not torch.equal(chosen, routes)


def test_the_oracle_notices_a_wrong_table(models, monkeypatch):
    """The rows of q and k in the wrong order inside a head: a table that says so must not pass."""
    source, family = models["deepseek2"], FAMILIES["deepseek2"]
    expected = sparse_logits(source, TOKENS)[0]
    swapped = tuple(replace(one, parts=one.parts[::-1]) if one.role == "attn_q_b" else one for one in family.linears)
    monkeypatch.setitem(FAMILIES, "deepseek2", replace(family, linears=swapped))
    assert difference(sparse_logits(RotatedView(source, ROTATIONS["nope"]), TOKENS)[0], expected) > BROKEN


def test_what_only_rotates_is_refused_elsewhere(models, tmp_path):
    source, out = models["deepseek2-lite"], tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("once upon a time")
    for what, stage in {
        "calibrated": lambda: calibrate(source, out, CalibrateConfig(), [text]),
        "quantized": lambda: quantize(source, out, QuantizeConfig(), None),
        "replicated": lambda: replicate(source, out, ReplicateConfig()),
        "exported": lambda: export(source, out, ExportConfig()),
    }.items():
        with pytest.raises(RondelError, match=f"deepseek2 models can be rotated, but not {what} yet"):
            stage()
    assert not out.exists()


def test_refusals(models, tmp_path):
    source, out = models["deepseek3"], tmp_path / "out"
    with pytest.raises(RondelError, match="one key for all heads"):
        rotate(source, out, RotateConfig(queries="full", target="rondel"))
    with pytest.raises(RondelError, match="do not divide the 24 hidden experts channels"):
        rotate(source, out, RotateConfig(hidden=28, target="rondel"))
    with pytest.raises(RondelError, match="nothing to rotate"):
        rotate(models["qwen3moe"], out, replace(NOTHING, latents=True, nope=True))
    extra = Patched(source, {"blk.1.nextn.weight": torch.ones(4)})
    with pytest.raises(RondelError, match=r"does not know what blk\.1\.nextn\.weight reads"):
        rotate(extra, out, RotateConfig())
    assert not out.exists()


@pytest.mark.parametrize(
    ("norm", "which", "message"),
    [
        (Norm("behind", "x", "kv_latent", None, "kv_latent"), "latents", "behind stands between"),
        (Norm("attn_q_norm", "x", "queries", None, "head_dim"), "nope", "attn_q_norm stands on the queries.*--no-nope"),
        (Norm("sub_norm", "x", "hidden_shared", None, "shared_hidden"), "hidden", "sub_norm stands on.*--hidden none"),
        (Norm("sub_norm", "x", "heads", None, "attended"), "heads", "stands between the values and attn_output"),
    ],
)
def test_norms_in_between_are_refused(norm, which, message, models, tmp_path, monkeypatch):
    family = FAMILIES["deepseek2"]
    monkeypatch.setitem(FAMILIES, "deepseek2", replace(family, norms=(*family.norms, norm)))
    # The folder was opened before: its tensors lack the norm, its table now has it.
    with pytest.raises(RondelError, match=message):
        rotate(models["deepseek3"], tmp_path / "out", ROTATIONS[which])
