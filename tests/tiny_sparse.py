"""Tiny random models with experts and latent attention: what `rotate` turns before the runtime runs such families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import SMALLEST_TOKENIZER, _randomize, _write_tokenizer

# Two dense layers' worth of everything that a table declares: grouped heads, a head size that is not width / heads.
COMMON: dict[str, Any] = {
    "vocab_size": SMALLEST_TOKENIZER,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,  # transformers' latent norms know no other
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN3MOE: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
DEEPSEEK: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3moe": ("Qwen3Moe", QWEN3MOE),
    "qwen3moe-tied": ("Qwen3Moe", QWEN3MOE | {"tie_word_embeddings": True, "norm_topk_prob": False}),
    "deepseek2": (
        "DeepseekV2",
        DEEPSEEK | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "attention_bias": True},
    ),
    "deepseek2-lite": ("DeepseekV2", DEEPSEEK | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek3": ("DeepseekV3", DEEPSEEK | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True}),
}
CORRECTION_SPREAD = 0.3


def tiny_sparse_model(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write the random model of that name in MODELS to `folder` and return it."""
    import transformers

    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**COMMON, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.float32)
    _randomize(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.copy_(CORRECTION_SPREAD * torch.randn(buffer.shape, generator=generator))
    if config.tie_word_embeddings:
        model.tie_weights()
    model.save_pretrained(folder)
    _write_tokenizer(folder, SMALLEST_TOKENIZER)
    return folder
