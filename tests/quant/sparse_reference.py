"""The reference forward pass of the families that only rotate knows: experts and latent attention, in one precision."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu, softmax

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import block_tensor
from rondel.quant.reference import ReferenceModel, rope_tables


class SparseReference(ReferenceModel):
    """`logits`, and in `routes` the experts of every token: (layer, tokens, used), sorted."""

    def __init__(self, source: Checkpoint, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(source, dtype)
        self.routes: list[torch.Tensor] = []

    def _attention(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return self._latent_attention(layer, x) if self.numbers.latents else super()._attention(layer, x)

    def _latent_attention(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """DeepSeek-V2 (arXiv 2405.04434), section 2.1; kv_b is applied to every position, nothing is absorbed."""
        n, numbers, latents = len(x), self.numbers, self.numbers.latents
        assert latents is not None
        if latents.queries:
            latent = self._norm(layer, "attn_q_a_norm", self._linear(layer, "attn_q_a", x))
            queries = self._linear(layer, "attn_q_b", latent)
        else:
            queries = self._linear(layer, "attn_q", x)
        q_nope, q_rope = queries.reshape(n, numbers.heads, -1).split([latents.nope, latents.rope], -1)
        latent, k_rope = self._linear(layer, "attn_kv_a_mqa", x).split([latents.keys_values, latents.rope], -1)
        both = self._linear(layer, "attn_kv_b", self._norm(layer, "attn_kv_a_norm", latent))
        k_nope, values = both.reshape(n, numbers.heads, -1).split([latents.nope, latents.values], -1)
        q_rope, k_rope = self._pairs(q_rope), self._pairs(k_rope[:, None])
        scores = torch.einsum("qhd,khd->hqk", q_nope, k_nope) + torch.einsum("qhd,kd->hqk", q_rope, k_rope[:, 0])
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        weights = softmax((scores / numbers.head_dim**0.5).masked_fill(future, float("-inf")), -1)
        attended = torch.einsum("hqk,khd->qhd", weights, values).reshape(n, -1)
        return self._linear(layer, "attn_output", attended)

    def _pairs(self, x: torch.Tensor) -> torch.Tensor:
        """RoPE of x (n, heads, rope_dim), adjacent channels in pairs."""
        cosine, sine = (table[:, None].to(self.dtype) for table in rope_tables(self.source, torch.arange(len(x))))
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cosine - b * sine, a * sine + b * cosine), dim=-1).flatten(-2)

    def _feed_forward(self, layer: int, x: torch.Tensor, hidden_gain: torch.Tensor | None = None) -> torch.Tensor:
        experts = self.numbers.experts
        assert experts is not None
        if layer < experts.dense:
            return super()._feed_forward(layer, x, hidden_gain)
        chosen, weights = self._route(layer, x)
        self.routes.append(chosen.sort(-1).values)
        added = torch.zeros_like(x)
        for expert in range(experts.count):
            tokens, slot = (chosen == expert).nonzero(as_tuple=True)
            if len(tokens):
                out = self._expert(layer, f"exps.{expert}", "hidden_experts", x[tokens])
                added.index_add_(0, tokens, out * weights[tokens, slot, None])
        return added + self._expert(layer, "shexp", "hidden_shared", x) if experts.shared else added

    def _expert(self, layer: int, suffix: str, site: str, x: torch.Tensor) -> torch.Tensor:
        hidden = silu(self._linear(layer, f"ffn_gate_{suffix}", x)) * self._linear(layer, f"ffn_up_{suffix}", x)
        return self._linear(layer, f"ffn_down_{suffix}", self._turned(site, layer, hidden))

    def _route(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token (n, used) and their weights."""
        experts = self.numbers.experts
        assert experts is not None
        logits = linear(x, self.source.read_float(block_tensor(layer, "ffn_gate_inp"), self.dtype))
        scores = logits.sigmoid() if experts.scores == "sigmoid" else softmax(logits, -1)
        correction = f"blk.{layer}.exp_probs_b.bias"
        choice = scores + self.source.read_float(correction, self.dtype) if correction in self.source else scores
        if experts.groups > 1:
            grouped = choice.unflatten(-1, (experts.groups, -1))
            # V3 judges a group by its two best experts, V2 by its best one.
            best = grouped.topk(2, -1).values.sum(-1) if experts.scores == "sigmoid" else grouped.amax(-1)
            kept = torch.zeros_like(best).scatter_(-1, best.topk(experts.used_groups, -1).indices, 1.0)
            choice = grouped.masked_fill(kept[..., None] == 0, float("-inf")).flatten(-2)
        chosen = choice.topk(experts.used, -1).indices
        weights = scores.gather(-1, chosen)
        if experts.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights * experts.scale


def sparse_logits(
    source: Checkpoint, tokens: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, vocabulary) of token ids (n,), and the experts of each token in each layer that has some."""
    model = SparseReference(source, dtype)
    return model.logits(tokens), torch.stack(model.routes)
