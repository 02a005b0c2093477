"""Owns how far a model's predictions are from the float model's on token windows, by perplexity.py's protocol.

Both run through transformers' decoder layers, one layer in memory at a time and every window on one thread; logits are
made a window at a time, so neither the model nor the logits have to fit memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import EMBEDDING
from rondel.quant.activations import SiteHooks
from rondel.quant.decoder_layers import DecoderLayers
from rondel.quant.perplexity import BLOCK, Score, log_softmax
from rondel.quant.workers import Workers


def last_states(model: Checkpoint, windows: torch.Tensor, workers: Workers, device: str = "cpu") -> torch.Tensor:
    """What the head reads of the scored positions, (windows, scored, width) F32, for token ids (windows, context)."""
    context = windows.shape[1]
    layers = DecoderLayers(model, device)
    rope = layers.positions(context)
    states = layers.look_up(model.read(EMBEDDING)[windows])
    online = [rotation for rotation in model.rotations if rotation.online]
    for layer in range(model.numbers.layers):
        module = layers.load(layer)
        with SiteHooks(module, model.family, online) as hooks:

            def advance(window: int, module: torch.nn.Module = module, hooks: SiteHooks = hooks) -> None:
                with torch.no_grad():
                    hooks.start()
                    states[window] = module(states[window][None].to(device), position_embeddings=rope)[0].cpu()
                    hooks.take()

            workers.run(advance, range(len(windows)))
    norm = layers.norm()
    with torch.no_grad():
        scored = states[:, context // 2 : -1]
        return torch.stack([norm(window.to(device)).cpu() for window in scored])


class Judge:
    """The float model `source` on windows (n, context), and other models measured against it."""

    def __init__(self, source: Checkpoint, windows: torch.Tensor, workers: Workers, device: str = "cpu") -> None:
        self.source = source
        self.windows = windows
        self._workers = workers
        self._device = device
        self._states = last_states(source, windows, workers, device)

    def measure(self, model: Checkpoint) -> dict[str, Any]:
        """`Score.result` of a float model with the same vocabulary (a DecodedView of a quantized one)."""
        states = last_states(model, self.windows, self._workers, self._device)
        head, base_head = (of.read_float(of.head()) for of in (model, self.source))
        following = self.windows[:, self.windows.shape[1] // 2 + 1 :].numpy().astype(np.int32)

        def score(window: int) -> Score:
            found, step = Score(), max(1, BLOCK // len(head))
            for first in range(0, states.shape[1], step):
                rows = slice(first, first + step)
                base = log_softmax((self._states[window, rows] @ base_head.T).numpy())
                logits = (states[window, rows] @ head.T).numpy()
                found.add(logits, following[window, rows], base.astype(np.float32))
            return found

        total = Score()
        for part in self._workers.map(score, range(len(self.windows))):
            total.nll += part.nll
            total.kl += part.kl
            total.nll_base += part.nll_base
            total.same_top += part.same_top
        return total.result()
