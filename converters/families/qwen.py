"""Qwen2 and 2.5 (biases on q, k, v), Qwen3 (norms on each head of q and k, head size from the config), Qwen3-MoE."""

from dataclasses import replace

from rondel.converters.families.experts import DENSE, EXPERTS, ROUTER
from rondel.converters.families.llama import ATTENTION, NORMS, SWIGLU
from rondel.converters.family import Family, Norm

_Q, _K, _V, _O = ATTENTION

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    linears=(_Q, _K, _V, replace(_O, bias=False), *SWIGLU),
    norms=NORMS,
    rope_layout="half",
)

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    linears=tuple(replace(linear, bias=False) for linear in (_Q, _K, _V, _O)) + SWIGLU,
    norms=(
        NORMS[0],
        Norm("attn_q_norm", "self_attn.q_norm", "queries", None, "head_dim"),
        Norm("attn_k_norm", "self_attn.k_norm", "keys", None, "head_dim"),
        NORMS[1],
    ),
    rope_layout="half",
    written_keys=("attention.key_length", "attention.value_length"),
)

QWEN3MOE = replace(
    QWEN3,
    name="qwen3moe",
    architectures=("Qwen3MoeForCausalLM",),
    linears=(*QWEN3.linears[:4], *DENSE, ROUTER, *EXPERTS),
    experts=True,
    runs=False,
)
