"""config.json to the numbers of experts and of latent attention, in the spellings of Qwen and DeepSeek."""

from __future__ import annotations

from typing import Literal

from rondel.converters.config_fields import ConfigFields
from rondel.converters.hyperparameters import Experts, Latents

COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
METHODS = ("greedy", "group_limited_greedy", "noaux_tc")  # to choose experts; the last one by sigmoid and a bias


def experts_of(config: ConfigFields) -> Experts:
    """The numbers of a mixture of experts; layers without experts must be the first ones."""
    fields = config.fields
    for name, only in (("decoder_sparse_step", 1), ("moe_layer_freq", 1), ("mlp_only_layers", [])):
        if fields.get(name) not in (None, only):
            raise config.refuse(name, f"{only} (every layer behind the first dense ones has experts)", fields[name])
    counted = next((name for name in COUNTS if fields.get(name) is not None), COUNTS[0])
    count, used = config.size(counted), config.size("num_experts_per_tok")
    if used > count:
        raise config.refuse("num_experts_per_tok", f"at most {counted} ({count})", used)
    method = fields.get("topk_method") or ("noaux_tc" if _is_v3(config) else "greedy")
    if method not in METHODS:
        raise config.refuse("topk_method", f"one of {', '.join(METHODS)}", method)
    groups = 1 if method == "greedy" else config.size("n_group", 1)
    used_groups = 1 if method == "greedy" else config.size("topk_group", 1)
    if count % groups or used_groups > groups:
        raise config.refuse("n_group", f"a divisor of {counted} ({count}), at least topk_group", groups)
    hidden = config.size("moe_intermediate_size")
    scores: Literal["softmax", "sigmoid"] = "sigmoid" if method == "noaux_tc" else "softmax"
    if fields.get("scoring_func") not in (None, scores):
        raise config.refuse("scoring_func", f"{scores} with topk_method {method}", fields["scoring_func"])
    return Experts(
        count=count,
        used=used,
        hidden=hidden,
        shared=hidden * (config.size("n_shared_experts") if fields.get("n_shared_experts") else 0),
        dense=config.size("first_k_dense_replace") if fields.get("first_k_dense_replace") else 0,
        scores=scores,
        normalized=config.flag("norm_topk_prob") if fields.get("norm_topk_prob") is not None else _is_v3(config),
        scale=config.number("routed_scaling_factor", fields.get("routed_scaling_factor") or 1.0),
        groups=groups,
        used_groups=used_groups,
    )


def _is_v3(config: ConfigFields) -> bool:
    """Whether the config leaves out what DeepSeek-V3 does unless told otherwise."""
    named = config.fields.get("architectures") or [""]
    return isinstance(named, list) and str(named[0]).startswith("DeepseekV3")


def latents_of(config: ConfigFields) -> Latents:
    """The numbers of latent attention. Its RoPE must turn adjacent channels."""
    if config.fields.get("rope_interleave") not in (None, True):
        raise config.refuse("rope_interleave", "true (pairs of adjacent channels)", config.fields["rope_interleave"])
    return Latents(
        queries=config.size("q_lora_rank") if config.fields.get("q_lora_rank") is not None else 0,
        keys_values=config.size("kv_lora_rank"),
        nope=config.size("qk_nope_head_dim"),
        rope=config.size("qk_rope_head_dim"),
        values=config.size("v_head_dim"),
    )
