"""Owns transformers' decoder layers of a checkpoint outside a whole model: one is made at a time.

Calibration, the sensitivities and sequential quantization run them over windows of text, whose hidden states they keep.
"""

from __future__ import annotations

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import OUTPUT_NORM
from rondel.converters.huggingface import huggingface_block, huggingface_config, huggingface_gain
from rondel.quant.hadamard import rotate_channels, rotate_channels_back


class DecoderLayers:
    """transformers' decoder layers of a checkpoint, made one at a time, and what they share."""

    def __init__(self, source: Checkpoint, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self.source = source
        self.device = device
        config = huggingface_config(source)
        config.num_hidden_layers = 1
        with torch.device("meta"):
            # "sdpa" without a mask is causal; "eager" would attend to the future.
            self._skeleton = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").model.eval()
        self._rope = type(self._skeleton.rotary_emb)(config=config).to(device)
        self._ends = next((rotation for rotation in source.rotations if rotation.site == "boundary"), None)
        self._skeleton.norm.register_forward_pre_hook(lambda _, inputs: (self.turn_back(inputs[0]),))

    def load(self, layer: int) -> torch.nn.Module:
        """The decoder layer with its weights, F32; it replaces the one before."""
        return self.put(self.read(layer))

    def read(self, layer: int) -> dict[str, torch.Tensor]:
        """The weights of a layer on the device, F32, under transformers' names."""
        return {name: tensor.to(self.device) for name, tensor in huggingface_block(self.source, layer).items()}

    def put(self, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
        """The decoder layer with these weights, which are shared and not copied; it replaces the one before."""
        module = self._skeleton.layers[0]
        module.load_state_dict(weights, strict=True, assign=True)
        return module

    def positions(self, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of RoPE for positions 0..context-1."""
        x = torch.empty(1, context, 1, device=self.device)
        return self._rope(x, position_ids=torch.arange(context, device=self.device)[None])

    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """What the first layer gets of rows (..., width) of the embedding, F32."""
        rows = rows.to(torch.float32)
        return rows if self._ends is None else rotate_channels(rows, self._ends)

    def turn_back(self, states: torch.Tensor) -> torch.Tensor:
        """States (..., width) of the residual stream in the basis of the embedding, which a tied head may keep."""
        return states if self._ends is None else rotate_channels_back(states, self._ends)

    def norm(self) -> torch.nn.Module:
        """The norm behind the last layer, which takes the states as the layer leaves them."""
        module = self._skeleton.norm
        module.load_state_dict({"weight": huggingface_gain(self.source, OUTPUT_NORM).to(self.device)}, assign=True)
        return module
