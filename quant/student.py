"""Owns the differentiable forward pass of a checkpoint: the float teacher, or the quantized student that is fitted.

Every tensor is decoded once, and all steps that run a layer share it. What is fitted comes in from outside: a step's
parameters as tensors in the place of the recorded ones, weights as tensors in the place of the decoded ones; gradients
flow to both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType

import numpy as np
import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import EMBEDDING, OUTPUT_NORM, block_tensor
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.replication import ATTENTION, FFN, MERGES, Replication, Step
from rondel.converters.replication_codec import decode_replication
from rondel.converters.replication_kinds import ACTIVATION_KINDS
from rondel.quant.activation_rounding import PLACES, round_activations
from rondel.quant.decoded_view import DecodedView
from rondel.quant.hadamard import rotate_channels, rotate_channels_back
from rondel.quant.reference import rms_norm, rope_tables, rope_turn

MEAN = MERGES.index("mean")

Values = Mapping[str, torch.Tensor]  # parameter kind -> values, shaped as in a ParameterSet; absent: changes nothing
Weights = Mapping[str, torch.Tensor]  # tensor name -> what stands in its place
UNCHANGED: Values = MappingProxyType({})
KeysValues = tuple[torch.Tensor, torch.Tensor]  # (batch, kv_heads, n, head_dim) twice


def base_path(layers: int) -> Replication:
    """The path of a model without replication: every layer once."""
    steps = tuple(Step(layer, 0, layer, layer) for layer in range(layers))
    return Replication(layers, steps, (0,) * layers)


def check_dense(source: Checkpoint, verb: str) -> None:
    """Refuse models that `Student` does not know; `verb` as in "tuned"."""
    if source.numbers.experts or source.numbers.latents or not source.family.runs:
        raise RondelError(
            f"{source.root}: {source.family.name} models are not {verb} yet; dense attention and feed-forward alone are"
        )


def check_teacher(source: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse a teacher whose answers are about other tokens."""
    if teacher.numbers.vocabulary != source.numbers.vocabulary:
        raise RondelError(
            f"{teacher.root}: the teacher has {teacher.numbers.vocabulary} tokens, the model has "
            f"{source.numbers.vocabulary}; the teacher must be the float model that this one was quantized from"
        )


class Student:
    """The forward pass of `source`, float or quantized, on token windows (b, n); runs the replication it records.

    `parameters` of the methods: one Values a parameter set (index = set - 1), in the place of `replication.sets`.
    """

    def __init__(self, source: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        check_dense(source, "fitted")
        self.source = source
        self.numbers: Hyperparameters = source.numbers
        self.layers = source.numbers.layers
        self.dtype, self.device = dtype, torch.device(device)
        decoded = DecodedView(source)
        self.tensors = {name: decoded.read(name).to(self.device, dtype) for name in source.names()}
        found, _ = decode_replication(source.manifest.get("replication") or {}, self.numbers)
        self.replication = found or base_path(self.layers)
        self._online = [rotation for rotation in source.rotations if rotation.online]
        self._rope: dict[int, KeysValues] = {}

    def weight(self, layer: int, role: str) -> torch.Tensor:
        """A matrix of a layer, (rows, cols), decoded."""
        return self.tensors[block_tensor(layer, role)]

    def norm(self, layer: int, role: str) -> torch.Tensor:
        """The gains of a norm of a layer, (size,)."""
        return self.tensors[block_tensor(layer, role)]

    def embed(self, tokens: torch.Tensor, weights: Weights | None = None) -> torch.Tensor:
        """The residual stream (b, n, width) before the first step, of token ids (b, n) at positions 0..n-1."""
        return self._turned("boundary", None, self._tensor(EMBEDDING, weights)[tokens.to(self.device)])

    def head(self, x: torch.Tensor, weights: Weights | None = None) -> torch.Tensor:
        """Logits (..., vocabulary) of the residual stream (..., width) after the last step."""
        for rotation in self._online:
            if rotation.site == "boundary":
                x = rotate_channels_back(x, rotation)
        x = rms_norm(x, self._tensor(OUTPUT_NORM, weights), self.numbers.norm_epsilon)
        return linear(x, self._tensor(self.source.head(), weights))

    def attention(
        self,
        layer: int,
        x: torch.Tensor,
        values: Values = UNCHANGED,
        kv: KeysValues | None = None,
        weights: Weights | None = None,
    ) -> tuple[torch.Tensor, KeysValues]:
        """What attention adds to the residual stream x (b, n, width), gates included, and the keys and values used.

        `kv`: those of an earlier step, read instead of its own.
        """
        normed = self._gained(values, "attn_norm_gain", self._normed(layer, "attn_norm", x, weights))
        if kv is None:
            made = self._split(self._linear(layer, "attn_v", normed, weights, values))
            kv = self._heads(layer, "attn_k", normed, weights, values), made
        queries = self._heads(layer, "attn_q", normed, weights, values)
        if "q_head_gain" in values:
            queries = queries * self._own(values["q_head_gain"])[:, None, None]
        group = self.numbers.heads // self.numbers.kv_heads  # query heads g*group .. share the key-value head g
        keys, seen = (half.repeat_interleave(group, 1) for half in kv)
        attended = scaled_dot_product_attention(queries, keys, seen, is_causal=True)
        added = self._linear(layer, "attn_output", attended.transpose(1, 2).flatten(2), weights, values)
        return self._shaped(values, "attn", added), kv

    def feed_forward(
        self, layer: int, x: torch.Tensor, values: Values = UNCHANGED, weights: Weights | None = None
    ) -> torch.Tensor:
        """What the feed-forward part adds to the residual stream x (b, n, width), gates included."""
        normed = self._gained(values, "ffn_norm_gain", self._normed(layer, "ffn_norm", x, weights))
        gate, up = (self._linear(layer, role, normed, weights, values) for role in ("ffn_gate", "ffn_up"))
        hidden = self._gained(values, "ffn_hidden_gain", silu(gate) * up)
        added = self._linear(layer, "ffn_down", self._turned("hidden", layer, hidden), weights, values)
        return self._shaped(values, "ffn", added)

    def run(
        self,
        x: torch.Tensor,
        replication: Replication | None = None,
        parameters: Sequence[Values] | None = None,
        weights: Weights | None = None,
    ) -> torch.Tensor:
        """The residual stream (b, n, width) after the last step. `replication` None: the recorded one, if any."""
        return deque(self.groups(x, replication, parameters, weights), maxlen=1)[0][1]

    def logits(
        self,
        tokens: torch.Tensor,
        replication: Replication | None = None,
        parameters: Sequence[Values] | None = None,
        weights: Weights | None = None,
    ) -> torch.Tensor:
        """Logits (b, n, vocabulary) of token ids (b, n), which stand at positions 0..n-1."""
        return self.head(self.run(self.embed(tokens, weights), replication, parameters, weights), weights)

    def streams(
        self,
        tokens: torch.Tensor,
        replication: Replication | None = None,
        parameters: Sequence[Values] | None = None,
        weights: Weights | None = None,
    ) -> list[torch.Tensor]:
        """The residual stream (b, n, width) after each base layer: after the last of its steps."""
        after: dict[int, torch.Tensor] = {}
        for layers, x in self.groups(self.embed(tokens, weights), replication, parameters, weights):
            after.update(dict.fromkeys(layers, x))
        return [after[layer] for layer in range(self.layers)]

    def groups(
        self,
        x: torch.Tensor,
        replication: Replication | None = None,
        parameters: Sequence[Values] | None = None,
        weights: Weights | None = None,
        *,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """The layers of each group of steps from `first` to `last`, and the residual stream after it.

        x stands before the group `first`; no group from there on may read a KV slot that an earlier one filled.
        """
        found = replication or self.replication
        slots: dict[int, KeysValues] = {}
        for group, steps in groupby(found.steps, key=lambda step: step.group):
            if group < first or (last is not None and group > last):
                continue
            members = list(steps)
            after = [self._step(step, x, self._values(found, step, parameters), slots, weights) for step in members]
            merged = after[0]
            for one in after[1:]:
                merged = merged + (one - x)
            x = x + (merged - x) / len(members) if found.merges[group] == MEAN else merged
            yield [step.layer for step in members], x

    def _step(
        self, step: Step, x: torch.Tensor, values: Values, slots: dict[int, KeysValues], weights: Weights | None
    ) -> torch.Tensor:
        if step.parts & ATTENTION:
            added, slots[step.slot] = self.attention(step.layer, x, values, slots.get(step.slot), weights)
            x = x + added
        if step.parts & FFN:
            x = x + self.feed_forward(step.layer, x, values, weights)
        return x

    def _values(self, found: Replication, step: Step, parameters: Sequence[Values] | None) -> Values:
        """What a step changes about its layer, by the rule of Replication.parameters."""
        if parameters is None or step.number == 0:
            return {kind: self._own(values) for kind, values in found.parameters(step).items()}
        indices = (found.layer_sets[step.layer] if found.layer_sets else 0, step.parameters)
        return {kind: values for index in indices if index for kind, values in parameters[index - 1].items()}

    def _own(self, values: torch.Tensor | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values).to(self.device, self.dtype)

    def _tensor(self, name: str, weights: Weights | None) -> torch.Tensor:
        return weights[name] if weights and name in weights else self.tensors[name]

    def _normed(self, layer: int, role: str, x: torch.Tensor, weights: Weights | None) -> torch.Tensor:
        return rms_norm(x, self._tensor(block_tensor(layer, role), weights), self.numbers.norm_epsilon)

    def _linear(self, layer: int, role: str, x: torch.Tensor, weights: Weights | None, values: Values) -> torch.Tensor:
        """A linear, with the activation kinds and the low-rank term of `values`; rounding passes gradients through."""
        if values.keys() & ACTIVATION_KINDS.keys():
            told = {kind: values[kind].detach().cpu().numpy() for kind in values.keys() & ACTIVATION_KINDS.keys()}
            rounded = round_activations(x.detach(), told, layer, PLACES[role], np.arange(x.shape[-2]))
            x = x + (rounded - x).detach()
        weight, bias = self._tensor(block_tensor(layer, role), weights), block_tensor(layer, role, "bias")
        y = linear(x, weight, self._tensor(bias, weights) if bias in self.tensors else None)
        if f"{role}_left" in values and f"{role}_right" in values:
            left, right = self._own(values[f"{role}_left"]), self._own(values[f"{role}_right"])
            y = y + linear(linear(x, right), left)
        return y

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(b, n, heads * head_dim) as (b, heads, n, head_dim)."""
        return x.unflatten(-1, (-1, self.numbers.head_dim)).transpose(1, 2)

    def _heads(self, layer: int, role: str, x: torch.Tensor, weights: Weights | None, values: Values) -> torch.Tensor:
        """Queries or keys (b, heads, n, head_dim), normalized where the family does so, then turned by RoPE."""
        heads = self._split(self._linear(layer, role, x, weights, values))
        if block_tensor(layer, f"{role}_norm") in self.tensors:
            heads = self._normed(layer, f"{role}_norm", heads, weights)
        turned = rope_turn(self.source, heads, *self._tables(x.shape[-2]))
        return self._turned("queries", layer, turned)

    def _tables(self, n: int) -> KeysValues:
        if n not in self._rope:
            cosine, sine = rope_tables(self.source, torch.arange(n))
            self._rope[n] = cosine.to(self.device, self.dtype), sine.to(self.device, self.dtype)
        return self._rope[n]

    def _turned(self, site: str, layer: int | None, x: torch.Tensor) -> torch.Tensor:
        """x (..., size) after the online rotation of that site, if it has one in this layer."""
        for rotation in self._online:
            if rotation.site == site and (rotation.layers is None or layer in rotation.layers):
                return rotate_channels(x, rotation)
        return x

    def _gained(self, values: Values, kind: str, x: torch.Tensor) -> torch.Tensor:
        return x * self._own(values[kind]) if kind in values else x

    def _shaped(self, values: Values, part: str, added: torch.Tensor) -> torch.Tensor:
        """gate * (gain * added + bias)."""
        added = self._gained(values, f"{part}_out_gain", added)
        bias = f"{part}_out_bias"
        return self._gained(values, f"gate_{part}", added + self._own(values[bias]) if bias in values else added)
