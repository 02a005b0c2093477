"""DeepSeek-V2 (and Lite, whose queries have no latent) and V3: latent attention, mixtures with a shared expert."""

from rondel.converters.families.experts import DENSE, EXPERTS, ROUTER, SHARED
from rondel.converters.families.llama import NORMS
from rondel.converters.family import Family, Linear, Norm, Site, Vector

_QUERY: tuple[tuple[Site, str], ...] = (("nope", "nope"), ("queries", "rope"))  # of each head

DEEPSEEK2 = Family(
    name="deepseek2",
    architectures=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    linears=(
        Linear("attn_q", "self_attn.q_proj", "attn_in", "queries", "queries_of_stream", "width", parts=_QUERY),
        Linear("attn_q_a", "self_attn.q_a_proj", "attn_in", "q_latent", "q_latent", "width", bias=True),
        Linear(
            "attn_q_b", "self_attn.q_b_proj", "q_latent_in", "queries", "queries_of_latent", "q_latent", parts=_QUERY
        ),
        Linear(
            "attn_kv_a_mqa",
            "self_attn.kv_a_proj_with_mqa",
            "attn_in",
            "kv_latent",
            "kv_latent_and_rope",
            "width",
            bias=True,
            parts=(("kv_latent", "kv_latent"), ("keys", "rope")),
        ),
        Linear(
            "attn_kv_b",
            "self_attn.kv_b_proj",
            "kv_latent_in",
            "values",
            "nope_and_values",
            "kv_latent",
            parts=(("nope", "nope"), ("values", "value")),
        ),
        Linear("attn_output", "self_attn.o_proj", "heads", "residual", "width", "attended", bias=True),
        *DENSE,
        ROUTER,
        *EXPERTS,
        *SHARED,
    ),
    norms=(
        NORMS[0],
        Norm("attn_q_a_norm", "self_attn.q_a_layernorm", "q_latent", "q_latent_in", "q_latent"),
        Norm("attn_kv_a_norm", "self_attn.kv_a_layernorm", "kv_latent", "kv_latent_in", "kv_latent"),
        NORMS[1],
    ),
    vectors=(Vector("exp_probs_b.bias", "mlp.gate.e_score_correction_bias", "experts", "experts"),),
    rope_layout="interleaved",  # in both orders of rows: nothing is permuted
    experts=True,
    latents=True,
    runs=False,
)
