"""Owns the reference forward pass of a checkpoint in one working precision: the oracle that stages are tested against.

Everything, the norms too, is computed in the precision that is asked for; a library that drops to float32 inside its
norms would hide a rotation's errors. Blocks are read one at a time, so any float checkpoint that fits a disk will do.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu, softmax

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import EMBEDDING, OUTPUT_NORM, ROPE_FACTORS, block_tensor
from rondel.converters.hyperparameters import Hyperparameters
from rondel.quant.hadamard import rotate_channels, rotate_channels_back


def rope_tables(source: Checkpoint, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every rotary angle, (n, rope_dim / 2) float64, for positions (n,)."""
    numbers = source.numbers
    half = numbers.rope_dim // 2
    frequencies = numbers.rope_base ** -(torch.arange(half, dtype=torch.float64) / half)
    scaling = numbers.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if ROPE_FACTORS in source:
        frequencies = frequencies / source.read_float(ROPE_FACTORS, torch.float64)
    elif kind == "linear":
        frequencies = frequencies / float(scaling["factor"])
    elif kind != "default":
        raise RondelError(f"{source.root}: the reference forward pass does not know RoPE scaling {kind!r}")
    angles = positions.to(torch.float64)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rope_turn(source: Checkpoint, heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Heads (..., head_dim) with every pair of channels turned; the tables broadcast to (..., head_dim / 2)."""
    half = source.numbers.head_dim // 2
    interleaved = source.family.rope_layout == "interleaved"
    pairs = heads.unflatten(-1, (half, 2)) if interleaved else heads.unflatten(-1, (2, half)).transpose(-1, -2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((a * cosine - b * sine, a * sine + b * cosine), dim=-1)
    return (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)


def rms_norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean x^2 + epsilon) * gain over the last axis, in the precision of x."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain


class ReferenceModel:
    """A checkpoint's forward pass in `dtype`: `logits`, or its pieces `embed`, `block` and `head` for other orders."""

    def __init__(self, source: Checkpoint, dtype: torch.dtype = torch.float64) -> None:
        self.source = source
        self.dtype = dtype
        self.numbers: Hyperparameters = source.numbers
        self._online = [rotation for rotation in source.rotations if rotation.online]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocabulary) of token ids (n,), which stand at positions 0..n-1."""
        x = self.embed(tokens)
        for layer in range(self.numbers.layers):
            x = self.block(layer, x)
        return self.head(x)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The residual stream (n, width) before the first block."""
        x = self.source.read(EMBEDDING)[tokens].to(self.dtype)
        return self._turned("boundary", None, x)

    def block(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """The residual stream (n, width) after one layer."""
        x = x + self._attention(layer, self._norm(layer, "attn_norm", x))
        return x + self._feed_forward(layer, self._norm(layer, "ffn_norm", x))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocabulary) of the residual stream after the last block."""
        for rotation in self._online:
            if rotation.site == "boundary":
                x = rotate_channels_back(x, rotation)
        x = rms_norm(x, self.source.read_float(OUTPUT_NORM, self.dtype), self.numbers.norm_epsilon)
        return linear(x, self.source.read_float(self.source.head(), self.dtype))

    def _norm(self, layer: int, role: str, x: torch.Tensor) -> torch.Tensor:
        gain = self.source.read_float(block_tensor(layer, role), self.dtype)
        return rms_norm(x, gain, self.numbers.norm_epsilon)

    def _linear(self, layer: int, role: str, x: torch.Tensor) -> torch.Tensor:
        bias = block_tensor(layer, role, "bias")
        return linear(
            x,
            self.source.read_float(block_tensor(layer, role), self.dtype),
            self.source.read_float(bias, self.dtype) if bias in self.source else None,
        )

    def _heads(self, layer: int, role: str, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Queries or keys as (heads, n, head_dim), normalized where the family does so, then turned by RoPE."""
        heads = self._linear(layer, role, x).reshape(len(x), -1, self.numbers.head_dim)
        if any(norm.role == f"{role}_norm" for norm in self.source.family.norms):
            heads = self._norm(layer, f"{role}_norm", heads)
        cosine, sine = (table[:, None].to(self.dtype) for table in rope)
        turned = rope_turn(self.source, heads, cosine, sine)
        return self._turned("queries", layer, turned).transpose(0, 1)

    def _attention(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return self._attend(layer, x, self._keys_values(layer, x))

    def _keys_values(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a KV cache holds, (kv_heads, n, head_dim) twice."""
        n, numbers = len(x), self.numbers
        keys = self._heads(layer, "attn_k", x, rope_tables(self.source, torch.arange(n)))
        return keys, self._linear(layer, "attn_v", x).reshape(n, numbers.kv_heads, numbers.head_dim).transpose(0, 1)

    def _attend(
        self,
        layer: int,
        x: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        head_gain: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What attention adds to the residual stream; `head_gain` (heads,) multiplies the queries."""
        n, numbers = len(x), self.numbers
        queries = self._heads(layer, "attn_q", x, rope_tables(self.source, torch.arange(n)))
        if head_gain is not None:
            queries = queries * head_gain[:, None, None]
        group = numbers.heads // numbers.kv_heads  # query heads g*group .. share the key-value head g
        keys, values = (half.repeat_interleave(group, 0) for half in keys_values)
        scores = queries @ keys.transpose(-1, -2) / numbers.head_dim**0.5
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        weights = softmax(scores.masked_fill(future, float("-inf")), -1)
        return self._linear(layer, "attn_output", (weights @ values).transpose(0, 1).reshape(n, -1))

    def _feed_forward(self, layer: int, x: torch.Tensor, hidden_gain: torch.Tensor | None = None) -> torch.Tensor:
        """What the feed-forward part adds to the residual stream; `hidden_gain` (hidden,) scales what down reads."""
        hidden = silu(self._linear(layer, "ffn_gate", x)) * self._linear(layer, "ffn_up", x)
        if hidden_gain is not None:
            hidden = hidden * hidden_gain
        return self._linear(layer, "ffn_down", self._turned("hidden", layer, hidden))

    def _turned(self, site: str, layer: int | None, x: torch.Tensor) -> torch.Tensor:
        """x (..., size) after the online rotation of that site, if it has one in this layer."""
        for rotation in self._online:
            if rotation.site == site and (rotation.layers is None or layer in rotation.layers):
                return rotate_channels(x, rotation)
        return x


def reference_logits(source: Checkpoint, tokens: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits (n, vocabulary) of token ids (n,) by a float checkpoint of any family, computed in `dtype` throughout."""
    return ReferenceModel(source, dtype).logits(tokens)
