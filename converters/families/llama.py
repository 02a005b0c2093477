"""Llama and Mistral: RMSNorm, grouped-query attention, SwiGLU, interleaved RoPE in GGUF."""

from rondel.converters.family import Family, Linear, Norm

ATTENTION = (
    Linear("attn_q", "self_attn.q_proj", "attn_in", "queries", "queries", "width", bias=True, rope=True),
    Linear("attn_k", "self_attn.k_proj", "attn_in", "keys", "keys", "width", bias=True, rope=True),
    Linear("attn_v", "self_attn.v_proj", "attn_in", "values", "values", "width", bias=True),
    Linear("attn_output", "self_attn.o_proj", "heads", "residual", "width", "queries", bias=True),
)
SWIGLU = (
    Linear("ffn_gate", "mlp.gate_proj", "ffn_in", "hidden", "hidden", "width"),
    Linear("ffn_up", "mlp.up_proj", "ffn_in", "hidden", "hidden", "width"),
    Linear("ffn_down", "mlp.down_proj", "hidden", "residual", "width", "hidden"),
)
NORMS = (
    Norm("attn_norm", "input_layernorm", "residual", "attn_in", "width"),
    Norm("ffn_norm", "post_attention_layernorm", "residual", "ffn_in", "width"),
)

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    linears=ATTENTION + SWIGLU,
    norms=NORMS,
    rope_layout="interleaved",
    written_keys=("attention.key_length", "attention.value_length", "vocab_size", "rope.dimension_count"),
)
