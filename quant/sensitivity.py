"""Sensitivities: how much the KL divergence of a model's answers grows per unit of output error of each matrix.

To second order KL = 1/2 d F d^T, where d is the error of the weights and F the Fisher information. Taken as diagonal
over rows, and with the second moment H of a matrix's inputs for the columns, as in K-FAC (Martens and Grosse, arXiv
1503.05671), row errors e_r cost KL = 1/2 sum_r s_r e_r H e_r^T a token. s_r = E|G_r|^2 / E|x|^2, where G_r is the
gradient of row r over a window of text, for the log-likelihood of labels drawn from the model's own answers: unlike
mean squared gradients of the output it counts errors that add up over tokens, as they do behind attention (attn_v: up
to three times as much).

One decoder layer is in memory at a time: a forward pass keeps the hidden states of a few windows, a backward pass goes
over them in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import EMBEDDING, OUTPUT, Linear, block_tensor
from rondel.converters.huggingface import interleave_rows
from rondel.converters.progress import Progress, silent
from rondel.quant.activations import SiteHooks
from rondel.quant.decoder_layers import DecoderLayers
from rondel.quant.hidden_states import HiddenStates
from rondel.quant.workers import Workers

SAMPLE_TOKENS = 16384  # run forward and backward: the sums over tokens and rows settle within a few percent
LEAST_WINDOWS = 4
STATES_IN_MEMORY = 1 << 30  # bytes of hidden states, of all layers, kept in memory; more go to a file
LOGITS_AT_ONCE = 1 << 24  # values: 64 MiB an array

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Sensitivity:
    """Mean squared gradients a token, of a log-likelihood in nats.

    `rows` holds s_r of each matrix, (rows,) by canonical name; that of the head stands under `output.weight` also where
    the embedding serves as head. `stream` (width,) is for what the embedding's lookup gives, and `frequency`
    (vocabulary,) the share of tokens that look a row up.
    """

    rows: Mapping[str, Doubles]
    stream: Doubles
    frequency: Doubles


def sample(windows: torch.Tensor) -> torch.Tensor:
    """The windows (n, context) that are run: SAMPLE_TOKENS of them, spread evenly."""
    wanted = min(len(windows), max(LEAST_WINDOWS, SAMPLE_TOKENS // windows.shape[1]))
    return windows[[i * len(windows) // wanted for i in range(wanted)]].to(torch.int64)


class _GradientHooks:
    """Hooks on one decoder layer: `start()` gives the dictionary that this thread's next pass fills.

    Role to its rows' |G_r|^2 over the window, followed by the sum of |x|^2: (rows + 1,) float64. G_r = sum_t g_tr x_t
    is reduced as soon as the gradient g of the output is known.
    """

    def __init__(self, layer: torch.nn.Module, linears: tuple[Linear, ...]) -> None:
        self._pass = threading.local()
        self._handles = [
            layer.get_submodule(linear.source).register_forward_hook(self._hook(linear.role)) for linear in linears
        ]

    def _hook(self, role: str) -> Callable[..., None]:
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            found: dict[str, torch.Tensor] = (
                self._pass.found
            )  # of the thread that runs forward; backward may be another
            x = inputs[0].detach().flatten(0, -2)
            energy = x.square().sum(dtype=torch.float64)[None]

            def keep(gradient: torch.Tensor) -> None:
                rows = (gradient.flatten(0, -2).T @ x).square().sum(1, dtype=torch.float64)
                found[role] = torch.cat([rows, energy]).cpu()

            output.register_hook(keep)

        return see

    def start(self) -> dict[str, torch.Tensor]:
        """The dictionary of the next pass, filled once its backward has run."""
        self._pass.found = {}
        found: dict[str, torch.Tensor] = self._pass.found
        return found

    def remove(self) -> None:
        """Take the hooks off the layer."""
        for handle in self._handles:
            handle.remove()


class _Pass:
    """The hidden states before every layer and the gradients behind them, for a few windows."""

    def __init__(self, source: Checkpoint, windows: torch.Tensor, device: str, folder: Path, seed: int) -> None:
        self.source = source
        self.windows = windows
        self.device = device
        self.seed = seed
        self.layers = DecoderLayers(source, device)
        self.rope = self.layers.positions(windows.shape[1])
        self.count = len(windows)
        shape = ((source.numbers.layers + 1) * self.count, windows.shape[1], source.numbers.width)
        self.states = HiddenStates(shape, folder, STATES_IN_MEMORY)
        # Backward through a layer overwrites the states behind it, which nobody needs again, with their gradients.
        self._values = self.states.before(0)

    def behind(self, layer: int) -> torch.Tensor:
        """States (windows, context, width) behind `layer` layers."""
        return self._values[layer * self.count : (layer + 1) * self.count]

    def embed(self) -> None:
        """Look the tokens up."""
        embedding = self.source.read(EMBEDDING)
        for window in range(self.count):
            self.behind(0)[window] = self.layers.look_up(embedding[self.windows[window]])

    def forward(self, layer: int, workers: Workers) -> None:
        """Fill the states behind a layer."""
        module = self.layers.load(layer)
        before, after = self.behind(layer), self.behind(layer + 1)

        def run(window: int) -> None:
            with torch.no_grad():
                hooks.start()
                after[window] = module(before[window][None].to(self.device), position_embeddings=self.rope)[0].cpu()
                hooks.take()

        with self._rotations(module) as hooks:
            workers.run(run, range(self.count))

    def backward(self, layer: int, workers: Workers) -> dict[str, torch.Tensor]:
        """Replace the states before a layer by their gradients; the hooks' sums over all windows."""
        module = self.layers.load(layer).requires_grad_(False)
        before, after = self.behind(layer), self.behind(layer + 1)

        def run(window: int) -> dict[str, torch.Tensor]:
            with torch.enable_grad():
                found = gradients.start()
                hooks.start()
                x = before[window][None].to(self.device, copy=True).requires_grad_()
                module(x, position_embeddings=self.rope).backward(after[window][None].to(self.device))
                hooks.take()
            assert x.grad is not None
            before[window] = x.grad[0].cpu()
            return found

        gradients = _GradientHooks(module, self.source.family.linears)
        try:
            with self._rotations(module) as hooks:
                return _sums(workers, run, self.count)
        finally:
            gradients.remove()

    def head(self, workers: Workers) -> torch.Tensor:
        """Replace the states behind the last layer by the gradients of drawn labels; the summed squares at the logits.

        Those are taken in expectation over the labels, E[(1{r = label} - p_r)^2] = p_r (1 - p_r).
        """
        norm = self.layers.norm().requires_grad_(False)
        weights = self.source.read_float(self.source.head()).to(self.device)
        states = self.behind(self.source.numbers.layers)
        step = max(1, LOGITS_AT_ONCE // len(weights))

        def run(window: int) -> dict[str, torch.Tensor]:
            draws = torch.rand(states.shape[1], generator=torch.Generator().manual_seed(self.seed * 1000003 + window))
            squares = torch.zeros(len(weights), dtype=torch.float64, device=self.device)
            with torch.enable_grad():
                x = states[window].to(self.device, copy=True).requires_grad_()
                read = norm(x)
            gradient = torch.empty_like(x)
            for first in range(0, len(gradient), step):
                rows = slice(first, first + step)
                p = (read[rows].detach() @ weights.T).softmax(-1)
                squares += (p * (1 - p)).sum(0, dtype=torch.float64)
                heights = p.cumsum(-1)
                labels = torch.searchsorted(heights, draws[rows, None].to(self.device) * heights[:, -1:])
                labels = labels.clamp(max=len(weights) - 1)
                gradient[rows] = weights[labels[:, 0]] - p @ weights
            read.backward(gradient)
            assert x.grad is not None
            states[window] = x.grad.cpu()
            return {OUTPUT: squares.cpu()}

        return _sums(workers, run, self.count)[OUTPUT]

    def _rotations(self, module: torch.nn.Module) -> SiteHooks:
        return SiteHooks(module, self.source.family, [found for found in self.source.rotations if found.online])


def _sums(workers: Workers, run: Callable[[int], dict[str, torch.Tensor]], count: int) -> dict[str, torch.Tensor]:
    """The sums of what `run` gives for each window, added in the windows' order."""
    total: dict[str, torch.Tensor] = {}
    for found in workers.map(run, range(count)):
        for name, value in found.items():
            total[name] = total[name] + value if name in total else value
    return total


def _canonical(source: Checkpoint, linear: Linear, values: torch.Tensor) -> torch.Tensor:
    """Values of transformers' rows in the order of the checkpoint's."""
    if not linear.rope or source.family.rope_layout != "interleaved":
        return values
    return interleave_rows(values, source.numbers.size(linear.rows) // source.numbers.head_dim)


def measure_sensitivity(
    source: Checkpoint,
    windows: torch.Tensor,
    folder: Path,
    *,
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Sensitivity:
    """Run a sample of token windows (n, context) forward and backward through a float model.

    `folder` gets the hidden states where they are big, and is removed. Raises RondelError where gradients are not
    finite.
    """
    layers, chosen = source.numbers.layers, sample(windows)
    run = _Pass(source, chosen, device, folder, seed)
    rows: dict[str, Doubles] = {}

    def keep(name: str, values: torch.Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            raise RondelError(f"{source.root}: gradients at {name} are not finite: the model overflows in float32")
        rows[name] = values.numpy()

    try:
        with Workers(threads if device == "cpu" else 1) as workers:
            run.embed()
            for layer in range(layers):
                progress(layer, 2 * layers + 1, "sensitivity")
                run.forward(layer, workers)
            progress(layers, 2 * layers + 1, "sensitivity")
            keep(OUTPUT, run.head(workers) / chosen.numel())
            for layer in reversed(range(layers)):
                progress(2 * layers - layer, 2 * layers + 1, "sensitivity")
                found = run.backward(layer, workers)
                for linear in source.family.linears:
                    sums, energy = found[linear.role][:-1], found[linear.role][-1]
                    keep(block_tensor(layer, linear.role), _canonical(source, linear, sums) / energy)
            read = run.layers.turn_back(run.behind(0).flatten(0, 1).to(torch.float64))
            stream = read.square().mean(0).numpy()
    finally:
        run.states.remove()
    return Sensitivity(rows, stream, _frequencies(windows, source.numbers.vocabulary))


def _frequencies(windows: torch.Tensor, vocabulary: int) -> Doubles:
    """The share of every token, with half an occurrence added to each: a token that was not seen can still come."""
    counts = torch.bincount(windows.flatten().to(torch.int64), minlength=vocabulary).numpy() + 0.5
    return counts / counts.sum()
