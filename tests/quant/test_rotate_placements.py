"""Placements with an algebra of their own: the ends of a tied model, RoPE's planes, queries and keys, uneven norms."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.families import FAMILIES
from rondel.converters.family import OUTPUT, OUTPUT_NORM, block_tensor
from rondel.converters.huggingface import huggingface_block
from rondel.quant.hadamard import rotate_channels
from rondel.quant.reference import ReferenceModel, reference_logits
from rondel.quant.rotate import RotateConfig, rotate
from rondel.quant.rotated_view import RotatedView
from rondel.quant.rotator import Rotator
from rondel.quant.workers import Workers
from tests.quant.test_rotate import (
    BROKEN,
    EXACT,
    FLOAT32,
    ROTATIONS,
    STORED_F32,
    TOKENS,
    Patched,
    difference,
    model,
)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3-tied"])
def test_a_tied_head_keeps_its_basis(name, tmp_path):
    source, config = model(name, tmp_path), RotateConfig(keep_tied=True, target="rondel")
    expected = reference_logits(source, TOKENS)
    assert difference(reference_logits(RotatedView(source, config), TOKENS), expected) < EXACT
    rotated = rotate(source, tmp_path / "rotated", config)
    assert difference(reference_logits(rotated, TOKENS), expected) < STORED_F32
    assert difference(reference_logits(rotated, TOKENS, torch.float32), expected) < FLOAT32
    assert OUTPUT not in rotated
    assert rotated.numbers.tied
    for name in ("token_embd.weight", OUTPUT_NORM):
        assert torch.equal(rotated.read(name), source.read(name))
    assert rotated.read("blk.0.attn_norm.weight").eq(1).all()
    fused, ends = rotated.rotations[:2]
    assert (fused.site, fused.online, ends.site, ends.online) == ("residual", False, "boundary", True)
    assert (ends.size, ends.block, ends.signs) == (fused.size, fused.block, fused.signs)
    for forgotten in ([], [dataclasses.replace(ends, signs="00" * (len(ends.signs) // 2))]):
        records = [fused.to_json(), *(record.to_json() for record in forgotten)]
        spoiled = Patched(rotated, {}, rotations=records)
        assert difference(reference_logits(spoiled, TOKENS), expected) > BROKEN


def test_even_norms_allow_rotations_of_pairs(tmp_path):
    """Qwen3's norms in front of RoPE commute with a plane's rotation where its two gains are equal, and only there."""
    source, config = model("qwen3", tmp_path), ROTATIONS["rope_pairs"]
    with pytest.raises(RondelError, match=r"attn_q_norm\.weight differs between the two channels of a RoPE pair"):
        rotate(source, tmp_path / "out", config)
    names = [block_tensor(layer, f"attn_{which}_norm") for layer in range(2) for which in "qk"]
    even = Patched(source, {name: source.read(name)[:12].repeat(2) for name in names})
    expected = reference_logits(even, TOKENS)
    view = RotatedView(even, config)
    assert difference(reference_logits(view, TOKENS), expected) < EXACT
    # Angles of another key head: the queries of a group must turn with the key that they meet.
    (record,) = view.read_rotations()
    other = dataclasses.replace(record, matrix=record.matrix.flip(0), site="rope_pairs")
    with Workers(1) as workers:
        rotator = Rotator(even, [other], workers, dtype=torch.float64)
        wrong = {name: rotator.tensor(name) for name in (block_tensor(layer, "attn_k") for layer in range(2))}
    tensors = {name: view.read(name) for name in view.names()}
    assert difference(reference_logits(Patched(view, tensors | wrong), TOKENS), expected) > BROKEN


class OneSided(ReferenceModel):
    """Turns the queries and not the keys."""

    def _keys_values(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ReferenceModel(Patched(self.source, {}, rotations=[]))._keys_values(layer, x)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_queries_and_keys_turn_alike(name, tmp_path):
    """The oracle's rotation behind RoPE is not the identity, and one side alone shows."""
    source = model(name, tmp_path)
    rotated = rotate(source, tmp_path / "rotated", ROTATIONS["queries"])
    (record,) = rotated.rotations
    assert (record.site, record.online, record.size, record.block) == ("queries", True, source.numbers.head_dim, 8)
    keys = ReferenceModel(rotated)._keys_values(0, ReferenceModel(rotated).embed(TOKENS))[0]
    before = ReferenceModel(source)._keys_values(0, ReferenceModel(source).embed(TOKENS))[0]
    assert torch.equal(keys, rotate_channels(before, record))
    assert difference(keys, before) > BROKEN
    assert difference(OneSided(rotated).logits(TOKENS), reference_logits(source, TOKENS)) > BROKEN


def test_gains_that_lack_one_are_whole_when_opened(tmp_path, monkeypatch):
    """A family whose norms multiply by 1 + g: folding sees the whole gain, and transformers gets g back."""
    plain = model("qwen3", tmp_path)
    stored, wrong = {name: plain.read(name) for name in plain.names()}, reference_logits(plain, TOKENS)
    monkeypatch.setitem(FAMILIES, "qwen3", dataclasses.replace(plain.family, norm_offset=1.0))
    source = open_checkpoint(plain.root)
    for name in (OUTPUT_NORM, "blk.1.ffn_norm.weight", "blk.0.attn_q_norm.weight"):
        assert torch.equal(source.read(name), stored[name] + 1)
        assert source.info(name).format == "F32"
    assert torch.equal(source.read("blk.0.ffn_down.weight"), stored["blk.0.ffn_down.weight"])
    given = huggingface_block(source, 1)["post_attention_layernorm.weight"]
    assert difference(given, stored["blk.1.ffn_norm.weight"].double()) < STORED_F32
    expected = reference_logits(source, TOKENS)
    assert difference(reference_logits(RotatedView(source, RotateConfig()), TOKENS), expected) < EXACT
    rotated = rotate(source, tmp_path / "rotated", RotateConfig())
    assert open_checkpoint(rotated.root).read(OUTPUT_NORM).eq(1).all()
    assert difference(reference_logits(rotated, TOKENS), expected) < STORED_F32
    assert difference(wrong, expected) > BROKEN
