"""The feed-forward part of a mixture of experts: a router, routed experts, and a shared expert where there is one."""

from dataclasses import replace

from rondel.converters.families.llama import SWIGLU
from rondel.converters.family import Linear, Site

_GATE, _UP, _DOWN = SWIGLU


def _experts(suffix: str, source: str, hidden: Site, size: str, *, each: bool) -> tuple[Linear, ...]:
    """Gate, up and down of the experts that stand in `source`, between the stream and their hidden site."""
    return tuple(
        replace(
            linear,
            role=linear.role + suffix,
            source=linear.source.replace("mlp", source),
            reads=hidden if linear is _DOWN else linear.reads,
            writes=linear.writes if linear is _DOWN else hidden,
            rows=linear.rows if linear is _DOWN else size,
            cols=size if linear is _DOWN else linear.cols,
            layers="experts",
            expert=each,
        )
        for linear in (_GATE, _UP, _DOWN)
    )


DENSE = tuple(replace(linear, layers="dense") for linear in SWIGLU)  # of the layers without experts
ROUTER = Linear("ffn_gate_inp", "mlp.gate", "ffn_in", "routes", "experts", "width", layers="experts", stays_float=True)
EXPERTS = _experts("_exps", "mlp.experts.{expert}", "hidden_experts", "expert_hidden", each=True)
SHARED = _experts("_shexp", "mlp.shared_experts", "hidden_shared", "shared_hidden", each=False)
