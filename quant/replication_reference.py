"""Owns the reference forward pass of a replicated checkpoint: what the native runtime's steps must agree with."""

from __future__ import annotations

import numpy as np
import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.replication import ATTENTION, FFN, MERGES, ParameterSet, Replication, Step
from rondel.converters.replication_codec import decode_replication
from rondel.quant.activation_rounding import PLACES, round_activations
from rondel.quant.reference import ReferenceModel

MEAN = MERGES.index("mean")


class ReplicatedReference(ReferenceModel):
    """The forward pass of `replication` on a float checkpoint, one step at a time, in `dtype` throughout."""

    def __init__(self, source: Checkpoint, replication: Replication, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(source, dtype)
        self.replication = replication
        self._values: ParameterSet = {}  # of the step that runs

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocabulary) of token ids (n,), which stand at positions 0..n-1."""
        slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        x = self.embed(tokens)
        groups: dict[int, list[Step]] = {}
        for step in self.replication.steps:
            groups.setdefault(step.group, []).append(step)
        for group, members in groups.items():
            changes = [self._step(step, x, slots) for step in members]
            before, x = x, changes[0]
            for change in changes[1:]:
                x = x + (change - before)
            if self.replication.merges[group] == MEAN:
                x = before + (x - before) / len(members)
        return self.head(x)

    def _step(self, step: Step, x: torch.Tensor, slots: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """The residual stream (n, width) after one step that is alone; fills or reads its KV slot."""
        values = self._values = self.replication.parameters(step)
        if step.parts & ATTENTION:
            normed = self._gained(values, "attn_norm_gain", self._norm(step.layer, "attn_norm", x))
            if step.slot not in slots:
                slots[step.slot] = self._keys_values(step.layer, normed)
            added = self._attend(step.layer, normed, slots[step.slot], self._value(values, "q_head_gain"))
            x = x + self._shaped(values, "attn", added)
        if step.parts & FFN:
            normed = self._gained(values, "ffn_norm_gain", self._norm(step.layer, "ffn_norm", x))
            added = self._feed_forward(step.layer, normed, self._value(values, "ffn_hidden_gain"))
            x = x + self._shaped(values, "ffn", added)
        return x

    def _linear(self, layer: int, role: str, x: torch.Tensor) -> torch.Tensor:
        """The linear on the inputs that the step's activation kinds leave, and its low-rank term on the same."""
        x = round_activations(x, self._values, layer, PLACES[role], np.arange(len(x)))
        y = super()._linear(layer, role, x)
        left, right = self._value(self._values, f"{role}_left"), self._value(self._values, f"{role}_right")
        return y if left is None or right is None else y + x @ right.T @ left.T

    def _value(self, values: ParameterSet, kind: str) -> torch.Tensor | None:
        return torch.from_numpy(values[kind]).to(self.dtype) if kind in values else None

    def _gained(self, values: ParameterSet, kind: str, x: torch.Tensor) -> torch.Tensor:
        gain = self._value(values, kind)
        return x if gain is None else x * gain

    def _shaped(self, values: ParameterSet, part: str, added: torch.Tensor) -> torch.Tensor:
        """gate * (gain * added + bias)."""
        added = self._gained(values, f"{part}_out_gain", added)
        bias = self._value(values, f"{part}_out_bias")
        return self._gained(values, f"gate_{part}", added if bias is None else added + bias)


def replicated_logits(source: Checkpoint, tokens: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits (n, vocabulary) of a float checkpoint with the replication that its manifest records, if any."""
    replication, _ = decode_replication(source.manifest.get("replication") or {}, source.numbers)
    if replication is None:
        return ReferenceModel(source, dtype).logits(tokens)
    return ReplicatedReference(source, replication, dtype).logits(tokens)
