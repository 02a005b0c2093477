"""Owns one model's hidden states on all windows, and the decoder layer that they stand before."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import Linear
from rondel.converters.huggingface import huggingface_rows
from rondel.converters.stats import OUTPUT_IN
from rondel.quant.activations import SiteHooks, SiteReached
from rondel.quant.decoder_layers import DecoderLayers
from rondel.quant.hidden_states import HiddenStates

STATES_IN_MEMORY = 1 << 29  # bytes of hidden states of one stream; more go to a file


class ModelStream:
    """Token windows (n, context) on their way through a model, one layer at a time.

    `begin` or `resume`, then for each layer: `enter`, any number of `inputs` and `replace`, `advance` for every window
    between `open` and `leave`. Behind the last layer `inputs` of `output_in` is what the head reads.
    """

    def __init__(self, source: Checkpoint, windows: torch.Tensor, folder: Path, device: str) -> None:
        self.source = source
        self.windows = windows
        self.device = device
        self.layer = 0
        self._layers = DecoderLayers(source, device)
        self._rope = self._layers.positions(windows.shape[1])
        self._states = HiddenStates((*windows.shape, source.numbers.width), folder, STATES_IN_MEMORY)

    def kept(self, layer: int) -> bool:
        """Whether an interrupted run left the states before `layer` on disk."""
        return self._states.kept(layer)

    def begin(self, embedding: Iterable[tuple[slice, torch.Tensor]]) -> None:
        """Fill the states before the first layer from the embedding's rows, some at a time."""
        self.resume(0)
        for rows, values in embedding:
            for window, tokens in enumerate(self.windows):
                here = (tokens >= rows.start) & (tokens < rows.stop)
                self._before[window, here] = self._layers.look_up(values[tokens[here] - rows.start])

    def resume(self, layer: int) -> None:
        """Stand before `layer`, with the states that `kept` found or `begin` is about to fill."""
        self.layer, self._before = layer, self._states.before(layer)

    def read(self) -> dict[str, torch.Tensor]:
        """The float weights of the layer."""
        return self._layers.read(self.layer)

    def enter(self, weights: dict[str, torch.Tensor]) -> None:
        """Take the layer's weights, as `read` gives them; they are shared, not copied."""
        self._module = self._layers.put(weights)
        online = [rotation for rotation in self.source.rotations if rotation.online]
        self._hooks = SiteHooks(self._module, self.source.family, online)

    def replace(self, linear: Linear, weights: torch.Tensor) -> None:
        """Give one matrix of the layer other weights, (rows, cols) F32 in canonical order."""
        rows = huggingface_rows(self.source, linear, weights).to(self.device)
        self._module.get_submodule(linear.source).weight = torch.nn.Parameter(rows, requires_grad=False)

    def enter_output(self) -> None:
        """Take the norm behind the last layer."""
        self._norm = self._layers.norm()

    def inputs(self, window: int, site: str) -> torch.Tensor:
        """What the readers of a site see of one window, (context, d) F32; the pass ends there."""
        x = self._before[window][None].to(self.device)
        with torch.no_grad():
            if site == OUTPUT_IN:
                seen: torch.Tensor = self._norm(x[0])
                return seen
            self._hooks.start(last=site)
            try:
                self._module(x, position_embeddings=self._rope)
            except SiteReached:
                return self._hooks.take()[site]
        raise AssertionError(f"no linear of the layer reads {site}")

    def open(self) -> None:
        """Make room for the states behind the layer."""
        self._after = self._states.before(self.layer + 1)

    def advance(self, window: int) -> None:
        """One window through the whole layer."""
        with torch.no_grad():
            self._hooks.start()
            x = self._before[window][None].to(self.device)
            self._after[window] = self._module(x, position_embeddings=self._rope)[0].cpu()

    def leave(self) -> None:
        """All windows are behind the layer; their states before it stay until the next `leave`."""
        self._hooks.remove()
        del self._module
        self._states.sync(self.layer + 1)
        self._states.drop(self.layer - 1)
        self.resume(self.layer + 1)

    def remove(self) -> None:
        """Delete what lies on disk."""
        self._states.remove()
