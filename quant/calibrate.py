"""Owns the calibrate stage: what every linear layer sees on text, measured with one decoder layer in memory at a time.

The hidden states of all windows are kept between layers, in memory or in a file beside the output. Every window runs on
one thread and windows are added in their order, so the bytes do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rondel.converters.checkpoint import Checkpoint, check_runs
from rondel.converters.errors import RondelError
from rondel.converters.family import EMBEDDING, block_tensor
from rondel.converters.folder import read_manifest, read_tensor
from rondel.converters.imatrix import write_imatrix
from rondel.converters.output import StageOutput
from rondel.converters.progress import Progress, silent
from rondel.converters.rotation import basis_hash
from rondel.converters.stats import OUTPUT_IN, TEXT, WINDOWS, Stats, site_tensor
from rondel.quant.activations import LayerSums, SiteHooks, Stream, StreamSummary, stream_of
from rondel.quant.calibration_text import CalibrationText, tokenize
from rondel.quant.decoder_layers import DecoderLayers
from rondel.quant.hidden_states import FLOAT32_BYTES, HiddenStates
from rondel.quant.stage import stage_record
from rondel.quant.workers import Workers, check_device

IMATRIX = "imatrix.gguf"  # in the output folder: the same statistics for llama-quantize
HIDDEN_STATES = "hidden-states"  # the folder for them, while calibrate runs
STATES_IN_MEMORY = 2 << 30  # bytes of hidden states kept in memory; more go to a file
GROUP = 8  # windows between two additions to the sums, or more where there are more threads


@dataclass(frozen=True)
class CalibrateConfig:
    """How much text to run. Windows are chosen by the seed where the text has more than `tokens`."""

    tokens: int = 131072
    context: int = 512  # tokens of a window
    seed: int = 0
    diagonal: bool = False  # means of squares only: rotate and error feedback need the full second moments
    chat: bool = False  # wrap every document in the model's chat template


class _Run:
    """One calibration: the windows pass layer after layer."""

    def __init__(self, source: Checkpoint, text: CalibrationText, config: CalibrateConfig, device: str) -> None:
        self.source = source
        self.text = text
        self.config = config
        self.device = device
        self.layers = DecoderLayers(source, device)
        self.rope = self.layers.positions(config.context)
        self.windows = range(len(text.windows))

    def embed(self, states: torch.Tensor) -> None:
        """Fill the states before the first layer."""
        embedding = self.source.read(EMBEDDING)
        for window in self.windows:
            states[window] = self.layers.look_up(embedding[self.text.windows[window]])

    def layer(
        self, layer: int, before: torch.Tensor, after: torch.Tensor, workers: Workers, *, measure: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Run one layer over all windows: its statistics tensors, and the summary of the stream behind it.

        Without `measure` (an earlier run did it) the states pass on and nothing is summed up.
        """
        module = self.layers.load(layer)
        online = [found for found in self.source.rotations if found.online]
        sums, stream = LayerSums(diagonal=self.config.diagonal), StreamSummary()
        with SiteHooks(module, self.source.family, online) as hooks:

            def forward(window: int) -> tuple[dict[str, torch.Tensor], Stream]:
                # Gradients are switched off for each thread by itself.
                with torch.no_grad():
                    hooks.start()
                    x = module(before[window][None].to(self.device), position_embeddings=self.rope)[0]
                    after[window] = x.cpu()
                    return hooks.take(), stream_of(x)

            for group in self.groups(workers):
                seen = list(workers.map(forward, group))
                for window, (_, found) in zip(group, seen, strict=True):
                    stream.add(window, found)
                if measure:
                    sums.add([sites for sites, _ in seen], workers)
        return sums.tensors(layer), stream.to_json()

    def output(self, states: torch.Tensor, workers: Workers) -> dict[str, torch.Tensor]:
        """The statistics of what the head reads."""
        norm = self.layers.norm()
        sums = LayerSums(diagonal=self.config.diagonal)

        def forward(window: int) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                return {OUTPUT_IN: norm(states[window].to(self.device))}

        for group in self.groups(workers):
            sums.add(list(workers.map(forward, group)), workers)
        return sums.tensors(None)

    def groups(self, workers: Workers) -> list[range]:
        """The windows whose activations are in memory at the same time; no result depends on how many they are."""
        size = max(GROUP, workers.threads)
        return [self.windows[first : first + size] for first in range(0, len(self.windows), size)]


def _states(source: Checkpoint, text: CalibrationText, folder: Path) -> HiddenStates:
    shape = (*text.windows.shape, source.numbers.width)
    return HiddenStates(shape, folder / HIDDEN_STATES, STATES_IN_MEMORY)


def _validate(source: Checkpoint, device: str) -> None:
    check_runs(source, "calibrated")
    if source.quantized:
        raise RondelError(f"{source.root}: is quantized; calibrate the model it was made from")
    check_device(device)


def _tokenize(source: Checkpoint, config: CalibrateConfig, text: Sequence[Path] | CalibrationText) -> CalibrationText:
    if isinstance(text, CalibrationText):
        return text
    return tokenize(source, text, tokens=config.tokens, context=config.context, seed=config.seed, chat=config.chat)


def plan(source: Checkpoint, config: CalibrateConfig, text: Sequence[Path] | CalibrationText) -> dict[str, Any]:
    """What calibrate would do: windows and tokens, the bytes of the statistics, and where the hidden states lie."""
    _validate(source, "cpu")
    windows = _tokenize(source, config, text)
    numbers = source.numbers
    sizes = [numbers.size(source.family.readers(site)[0].cols) for site in source.family.sites] * numbers.layers
    # A diagonal, the largest values and a count; the full second moment on top.
    elements = sum(2 * size + 1 + (0 if config.diagonal else size * size) for size in [*sizes, numbers.width])
    elements += windows.tokens
    states = windows.tokens * numbers.width * FLOAT32_BYTES
    return {
        "stage": "calibrate",
        "windows": len(windows.windows),
        "context": windows.windows.shape[1],
        "tokens": windows.tokens,
        "text_sha256": windows.sha256(),
        "tensor_bytes": elements * FLOAT32_BYTES,
        "hidden_state_bytes": states,
        "hidden_states": "memory" if states <= STATES_IN_MEMORY else "disk",
    }


def calibrate(
    source: Checkpoint,
    out: Path,
    config: CalibrateConfig,
    text: Sequence[Path] | CalibrationText,
    *,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = silent,
) -> Stats:
    """Run a float model over text files (or windows of token ids) and write the statistics of every site to `out`.

    The token ids are written too, since quantize runs the model on them again. Beside them lies `out`/imatrix.gguf,
    llama.cpp's form of the diagonals. Raises RondelError for quantized models, for text that does not fill a window,
    and for activations that are not finite.
    """
    _validate(source, device)
    windows = _tokenize(source, config, text)
    record = stage_record("calibrate", config, source=source, text=windows.sha256())
    output = StageOutput(out, record, force=force, beside=(HIDDEN_STATES, IMATRIX))
    if output.finished:
        return Stats(out, read_manifest(out))
    run = _Run(source, windows, config, device)
    states = _states(source, windows, output.partial)
    with Workers(threads if device == "cpu" else 1) as workers:
        shards = _measure(run, states, output, workers, progress)
    states.remove()
    if not output.done(TEXT):
        output.write(TEXT, {WINDOWS: windows.windows.to(torch.int32)})
    _write_imatrix(source, windows, output, shards)
    carried = source.carried()
    kept = ("family", "hyperparameters", "source", "rotations")
    summaries = {f"blk.{layer}": output.result(shards[layer]) for layer in range(source.numbers.layers)}
    manifest = {
        "kind": "stats",
        **{key: carried[key] for key in kept if key in carried},
        "calibration": {"sha256": windows.sha256(), "tokens": windows.tokens},
        "residual": summaries,
        "stages": [*source.stages, record],
    }
    output.finish([*shards, TEXT], manifest)
    return Stats(out, read_manifest(out))


def _measure(run: _Run, states: HiddenStates, output: StageOutput, workers: Workers, progress: Progress) -> list[str]:
    """Pass the windows through all layers and journal each one; returns the shards. Goes on where a run was stopped."""
    layers = run.source.numbers.layers
    shards = [*(f"blk-{layer:05d}" for layer in range(layers)), "output"]
    finished = next((index for index, shard in enumerate(shards) if not output.done(shard)), len(shards))
    # The states behind a layer are safe on disk before the journal tells that the layer is done.
    first = finished if finished > layers or (finished and states.kept(finished)) else 0
    progress(min(first, layers), len(shards), shards[min(first, layers)])
    if first == 0:
        run.embed(states.before(0))
    for layer in range(first, layers):
        progress(layer, len(shards), shards[layer])
        known = output.done(shards[layer])
        before, after = states.before(layer), states.before(layer + 1)
        tensors, summary = run.layer(layer, before, after, workers, measure=not known)
        if not known:
            states.sync(layer + 1)
            output.write(shards[layer], tensors, summary)
        states.drop(layer)
    progress(layers, len(shards), "output")
    if not output.done("output"):
        output.write("output", run.output(states.before(layers), workers))
    progress(len(shards), len(shards), "done")
    return shards


def _write_imatrix(source: Checkpoint, text: CalibrationText, output: StageOutput, shards: list[str]) -> None:
    sums: dict[str, tuple[np.ndarray, float]] = {}

    def add(name: str, layer: int | None, site: str) -> None:
        shard = shards[-1 if layer is None else layer]
        mean = read_tensor(output.partial / f"{shard}.safetensors", site_tensor(layer, site, "diagonal")).to(
            torch.float64
        )
        sums[name] = (mean.numpy() * text.tokens, float(text.tokens))

    for layer in range(source.numbers.layers):
        for linear in source.family.linears:
            add(block_tensor(layer, linear.role), layer, linear.reads)
    add(source.head(), None, OUTPUT_IN)
    write_imatrix(
        output.partial / IMATRIX,
        sums,
        datasets=text.names,
        chunk_size=text.windows.shape[1],
        chunk_count=len(text.windows),
        basis=basis_hash(source.manifest.get("rotations", [])),
    )
