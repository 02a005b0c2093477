"""Opening Hugging Face folders: every layout of weight files, both spellings of config.json, and what is refused."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import EMBEDDING, OUTPUT, ROPE_FACTORS
from rondel.converters.huggingface import (
    huggingface_block,
    huggingface_config,
    huggingface_outer,
    interleave_rows,
    open_huggingface,
    separate_rows,
)
from tests.tiny import FAMILIES, tiny_model
from tests.tiny_sparse import tiny_sparse_model

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FLOAT32_ROUNDING = 1e-6  # of a frequency, relative: pow and cosine in other orders


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_in_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gets_back_what_it_wrote(family: str, tied: bool, tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path / "m", tied=tied)
    checkpoint = open_checkpoint(folder)
    found = huggingface_outer(checkpoint)
    for layer in range(checkpoint.numbers.layers):
        found |= {f"model.layers.{layer}.{name}": t for name, t in huggingface_block(checkpoint, layer).items()}
    stored = load_file(folder / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    assert checkpoint.head() == (EMBEDDING if tied else OUTPUT)
    assert huggingface_config(checkpoint).tie_word_embeddings is tied


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_in_one_shard_of_the_stages(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model(family, tmp_path / "m", layers=3))
    shards = checkpoint.shards()
    assert list(shards) == ["embedding", "blk-00000", "blk-00001", "blk-00002", "output"]
    assert sorted(name for names in shards.values() for name in names) == sorted(checkpoint.names())
    assert all(checkpoint.read(name).shape == checkpoint.info(name).shape for name in checkpoint.names())


def test_rope_rows_are_interleaved_for_llama_alone(tmp_path: Path) -> None:
    for family, turned in (("llama", True), ("qwen3", False)):
        folder = tiny_model(family, tmp_path / family)
        stored = load_file(folder / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
        checkpoint = open_checkpoint(folder)
        read, half = checkpoint.read("blk.1.attn_k.weight"), checkpoint.numbers.head_dim // 2
        for head in range(2):
            first = head * 2 * half
            expected = stored[[first, first + half]] if turned else stored[[first, first + 1]]
            assert torch.equal(read[first : first + 2], expected)


def test_row_orders_are_inverse() -> None:
    for rows in (torch.randn(24, 5), torch.randn(24)):
        assert torch.equal(separate_rows(interleave_rows(rows, 3), 3), rows)
        assert not torch.equal(interleave_rows(rows, 3), rows)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_all_layouts_of_files_hold_the_same(dtype: str, tmp_path: Path) -> None:
    one = tiny_model("qwen2", tmp_path / "a" / "m", dtype=dtype)
    sharded = tiny_model("qwen2", tmp_path / "b" / "m", dtype=dtype, shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    pickled = tiny_model("qwen2", tmp_path / "c" / "m", dtype=dtype)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    first, *others = (open_checkpoint(folder) for folder in (one, sharded, pickled))
    for other in others:
        assert other.names() == first.names()
        assert all(torch.equal(other.read(name), first.read(name)) for name in first.names())
        assert all(other.read(name).dtype == getattr(torch, dtype) for name in first.names())
        assert other.fingerprint() == first.fingerprint()


def test_old_pickles_without_zip_are_read(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert torch.equal(open_checkpoint(folder).read(EMBEDDING), tensors["model.embed_tokens.weight"])


class Payload:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    for write in (torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2))):
        write({"lm_head.weight": Payload(str(ran))}, folder / "pytorch_model.bin")
        with pytest.raises(RondelError, match="not a plain dictionary of tensors"):
            open_huggingface(folder)
    assert not ran.exists()


def test_the_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m")
    before = open_checkpoint(folder).fingerprint()
    moved = folder.rename(tmp_path / "elsewhere")
    (tmp_path / "parent").mkdir()
    back = moved.rename(tmp_path / "parent" / "m")
    assert open_checkpoint(back).fingerprint() == before
    source = open_checkpoint(back).carried()["source"]
    assert source["name"] == "m"
    edit_weights(back, lambda tensors: tensors["model.norm.weight"].add_(1))
    after = open_checkpoint(back)
    changed = after.fingerprint()
    assert changed != before
    assert after.carried()["source"]["sha256"] != source["sha256"]
    tokenizer = back / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert open_checkpoint(back).fingerprint() != changed


def test_both_spellings_of_the_config_mean_the_same(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m", rope_parameters=LLAMA3_SCALING)
    new = open_huggingface(folder).numbers
    old_scaling = {key: value for key, value in LLAMA3_SCALING.items() if key != "rope_theta"}
    old = {"rope_theta": 10000.0, "rope_scaling": old_scaling, "torch_dtype": "float32"}
    edit_config(folder, rope_parameters=..., dtype=..., **old)
    assert open_huggingface(folder).numbers == new
    assert new.rope_scaling is not None
    edit_config(folder, rope_scaling={"type": "linear", "factor": 4.0})
    assert open_huggingface(folder).numbers.rope_scaling == {"rope_type": "linear", "factor": 4.0}


def test_llama3_factors_are_those_of_transformers(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m", head_dim=32, rope_parameters=LLAMA3_SCALING)
    checkpoint = open_checkpoint(folder)
    factors = checkpoint.read(ROPE_FACTORS)
    plain = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    expected = load_in_transformers(folder).model.rotary_emb.inv_freq
    assert torch.allclose(plain / factors, expected, rtol=FLOAT32_ROUNDING, atol=0)
    assert factors[0] == 1
    assert factors[-1] == 8
    assert any(1 < factor < 8 for factor in factors.tolist())
    assert ROPE_FACTORS in checkpoint.shards()["embedding"]


def test_a_tied_config_with_another_head_is_untied(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m", tied=True)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert open_checkpoint(folder).head() == EMBEDDING
    edit_weights(folder, lambda t: t["lm_head.weight"].add_(1))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.head() == OUTPUT
    assert checkpoint.numbers.tied is False
    assert huggingface_config(checkpoint).tie_word_embeddings is False


def test_llama_with_attention_biases(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m", attention_bias=True)
    checkpoint = open_checkpoint(folder)
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(
        checkpoint.read("blk.0.attn_q.bias"), interleave_rows(stored["model.layers.0.self_attn.q_proj.bias"], 4)
    )
    assert "blk.1.attn_output.bias" in checkpoint
    edit_weights(folder, lambda t: t.pop("model.layers.1.self_attn.o_proj.bias"))
    with pytest.raises(RondelError, match=r"model\.layers\.1\.self_attn\.o_proj\.bias is missing"):
        open_huggingface(folder)


def test_buffers_that_readers_compute_are_ignored(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m")
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert len(open_huggingface(folder).names()) == 21


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*not supported.*LlamaForCausalLM"),
        ({"architectures": ...}, "not supported"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.*gptq"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_scaling must be one of.*yarn"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor of rope_scaling linear"),
        ({"rope_parameters": {"rope_type": "linear", "factor": math.inf}}, "factor of rope_scaling linear"),
        ({"rope_parameters": LLAMA3_SCALING | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 1 << 22}, "num_hidden_layers is 4194304, the weights are only 21 tensors"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": 128, "head_dim": 16}, r"model\.embed_tokens\.weight has the shape \[288, 64\].*\[288, 128\]"),
        ({"num_hidden_layers": 1}, "not part of this architecture"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight is missing"),
    ],
)
def test_a_config_that_rondel_would_compute_otherwise_is_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = tiny_model("llama", tmp_path / "m")
    edit_config(folder, **changes)
    with pytest.raises(RondelError, match=sentence) as refusal:
        open_huggingface(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (lambda t: t.update({"model.layers.0.extra": torch.ones(1)}), r"model\.layers\.0\.extra is not part"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), r"model\.norm\.weight has the shape \[63\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "I8, expected F32, F16 or BF16"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.float64)}), "F64, expected"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], sentence: str, tmp_path: Path
) -> None:
    folder = tiny_model("llama", tmp_path / "m")
    edit_weights(folder, change)
    with pytest.raises(RondelError, match=sentence):
        open_huggingface(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_is_no_number_is_refused_when_read(value: float, dtype: str, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m", dtype=dtype)
    edit_weights(folder, lambda t: t["model.layers.0.mlp.down_proj.weight"].view(-1)[7].fill_(value))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(RondelError, match=r"model\.layers\.0\.mlp\.down_proj\.weight holds 1 NaN or infinite"):
        checkpoint.read("blk.0.ffn_down.weight")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m", shard_size="60KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        shards[1].write_bytes(whole[:size])
        with pytest.raises(RondelError, match=rf"{shards[1].name}: is not a whole safetensors file"):
            open_huggingface(folder)
    shards[1].unlink()
    with pytest.raises(RondelError, match=rf"{shards[1].name}: this shard of the weights is missing"):
        open_huggingface(folder)
    for escape in ("../m2.safetensors", "/etc/model.safetensors", "sub/m.safetensors", "..", 7, "a\\b.safetensors"):
        index["weight_map"]["model.norm.weight"] = escape
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(RondelError, match="expected a file of this folder"):
            open_huggingface(folder)
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(RondelError, match="not an index"):
        open_huggingface(folder)


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m", shard_size="60KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = other
    path.write_text(json.dumps(index))
    with pytest.raises(RondelError, match=r"model\.norm\.weight is missing"):
        open_huggingface(folder)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RondelError, match="not a folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(RondelError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(RondelError, match="expected a JSON object"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RondelError, match="is not JSON"):
        open_checkpoint(tmp_path)
    folder = tiny_model("llama", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RondelError, match="holds no weights"):
        open_checkpoint(folder)


def test_experts_and_latents_are_read(tmp_path: Path) -> None:
    folder = tiny_sparse_model("deepseek3", tmp_path / "m")
    stored, checkpoint = load_file(folder / "model.safetensors"), open_checkpoint(folder)
    assert len(checkpoint.names()) == len(stored)
    for name, source in {
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.1.ffn_gate_exps.7.weight": "model.layers.1.mlp.experts.7.gate_proj.weight",
        "blk.2.ffn_down_shexp.weight": "model.layers.2.mlp.shared_experts.down_proj.weight",
        "blk.2.ffn_gate_inp.weight": "model.layers.2.mlp.gate.weight",
        "blk.2.exp_probs_b.bias": "model.layers.2.mlp.gate.e_score_correction_bias",
        "blk.1.attn_kv_a_mqa.weight": "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    }.items():
        assert torch.equal(checkpoint.read(name), stored[source]), name
    assert "blk.0.ffn_gate_inp.weight" not in checkpoint
    stretched = {"rope_type": "yarn", "factor": 40, "beta_fast": 32}
    edit_config(folder, rope_parameters=stretched)
    assert open_checkpoint(folder).numbers.rope_scaling == stretched


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"num_experts_per_tok": 9}, r"at most n_routed_experts \(8\)"),
        ({"topk_method": "random"}, "topk_method must be one of greedy"),
        ({"scoring_func": "softmax"}, "scoring_func must be sigmoid"),
        ({"n_group": 3}, "n_group must be a divisor"),
        ({"rope_interleave": False}, "rope_interleave must be true"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even"),
        ({"kv_lora_rank": ...}, "kv_lora_rank must be a positive integer"),
        ({"first_k_dense_replace": 2}, "mlp.gate_proj.weight is missing"),
        ({"num_hidden_layers": 2}, "is not part of this architecture"),
    ],
)
def test_experts_that_contradict_the_table_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tiny_sparse_model("deepseek3", tmp_path / "m")
    edit_config(folder, **changes)
    with pytest.raises(RondelError, match=message):
        open_checkpoint(folder)
