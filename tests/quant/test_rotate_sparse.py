"""Do rotated models with experts and latent attention compute the same function, and choose the same experts?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.quant.rotate import RotateConfig, rotate
from rondel.quant.rotated_view import RotatedView
from tests.quant.sparse_reference import sparse_logits
from tests.quant.test_rotate import EXACT, FLOAT32, STORED_F32, difference
from tests.tiny import SMALLEST_TOKENIZER
from tests.tiny_sparse import MODELS, tiny_sparse_model

# transformers' norms, RoPE tables and routers are float32 whatever the model's precision.
FLOAT32_NORMS = 1e-5
TOKENS = torch.randint(0, SMALLEST_TOKENIZER, (24,), generator=torch.Generator().manual_seed(5))


def model(name: str, folder: Path) -> Checkpoint:
    return open_checkpoint(tiny_sparse_model(name, folder / name))


@pytest.mark.parametrize("name", MODELS)
def test_the_oracle_computes_what_transformers_computes(name, tmp_path):
    from transformers import AutoModelForCausalLM

    source = model(name, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.float32, experts_implementation="eager")
    theirs = theirs.double().eval()
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    assert difference(sparse_logits(source, TOKENS)[0], expected) < FLOAT32_NORMS


NOTHING = RotateConfig(residual=False, heads=False, latents=False, nope=False, target="rondel")
ROTATIONS = {
    "residual": replace(NOTHING, residual=True),
    "heads": replace(NOTHING, heads=True),
    "latents": replace(NOTHING, latents=True),
    "nope": replace(NOTHING, nope=True),
    "hidden": replace(NOTHING, hidden="full"),
    "all": RotateConfig(hidden=8, seed=3, target="rondel"),
}
# The weights that a rotation must have changed, where a model has them.
CHANGED = {
    "residual": ["attn_q", "attn_q_a", "attn_kv_a_mqa", "attn_output", "ffn_gate", "ffn_gate_inp", "ffn_up_exps.1",
                 "ffn_down_exps.2", "ffn_gate_shexp", "ffn_down_shexp"],
    "heads": ["attn_v", "attn_kv_b", "attn_output"],
    "latents": ["attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b"],
    "nope": ["attn_q", "attn_q_b", "attn_kv_b"],
    "hidden": ["ffn_down", "ffn_down_exps.0", "ffn_down_exps.5", "ffn_down_shexp"],
}  # fmt: skip


def cases() -> list[tuple[str, str]]:
    """Models and the placements that they have."""
    latent = ("latents", "nope")
    return [(name, which) for name in MODELS for which in ROTATIONS if "deepseek" in name or which not in latent]


@pytest.mark.parametrize(("name", "which"), cases())
def test_rotated_model_computes_the_same_function(name, which, tmp_path):
    source, config = model(name, tmp_path), ROTATIONS[which]
    expected, routes = sparse_logits(source, TOKENS)
    got, chosen = sparse_logits(RotatedView(source, config), TOKENS)
    assert difference(got, expected) < EXACT
    assert torch.equal(chosen, routes)
    rotated = open_checkpoint(rotate(source, tmp_path / "rotated", config).root)
    got, chosen = sparse_logits(rotated, TOKENS)
    assert difference(got, expected) < STORED_F32
    assert torch.equal(chosen, routes)
    assert difference(sparse_logits(rotated, TOKENS, torch.float32)[0], expected) < FLOAT32
    roles = CHANGED.get(which) or sorted({role for some in CHANGED.values() for role in some})
    names = [f"blk.{layer}.{role}.weight" for layer in range(3) for role in roles]
    changed = [weight for weight in names if weight in source]
    assert changed
    assert not any(torch.equal(rotated.read(weight), source.read(weight)) for weight in changed)
