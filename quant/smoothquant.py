"""Owns SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): the range of activations is shared with the weights.

The scale of a channel is max |x|^alpha / max |w|^(1 - alpha), over all the linears that read it, and folds into the
norm in front of them. The method was made for activations of eight bits: it moves their outliers into the weights,
which at two or three bits costs more than it gains unless alpha is small.
"""

from __future__ import annotations

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import block_tensor
from rondel.converters.progress import Progress, silent
from rondel.converters.stats import Stats
from rondel.quant.rescaled_view import Place, Rescaling, normalized, place_name, rescalable

ALPHA = 0.5
LEAST = 1e-5  # of the largest channel: what a channel that is never active, or never read, counts


def scale_of(inputs: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """inputs^alpha / weights^(1 - alpha) of the largest magnitudes a channel (d,), with the geometric mean 1."""
    x, w = (most.to(torch.float64).clamp(min=LEAST * float(most.max())) for most in (inputs, weights))
    if float(x.max()) == 0 or float(w.max()) == 0:
        return torch.ones(len(x))
    return normalized(x**alpha / w ** (1 - alpha))


def check(source: Checkpoint, stats: Stats | None) -> None:
    """Refuse statistics without the largest activations."""
    for layer in range(source.numbers.layers):
        for place in _places(source, layer):
            if stats is None or not stats.has(*place, "absmax"):
                raise RondelError(
                    f"--method smoothquant: nothing holds the largest activations of {place_name(place)}; an imatrix "
                    "file does not, nor do statistics that followed a rotation: calibrate this model, give its --stats"
                )


def _places(source: Checkpoint, layer: int) -> list[Place]:
    return [place for place in rescalable(source, layer) if source.family.norm_making(place[1]) is not None]


def scale_at(source: Checkpoint, stats: Stats, place: Place, alpha: float = ALPHA) -> torch.Tensor | None:
    """The scales of one place, (d,) F32, or None where no norm takes them up."""
    layer, site = place
    if layer is None or place not in _places(source, layer):
        return None
    names = [block_tensor(layer, linear.role) for linear in source.family.readers(site)]
    most = torch.stack([source.read(name).abs().amax(0).to(torch.float32) for name in names]).amax(0)
    return scale_of(stats.absmax(layer, site), most, alpha)


def choose(source: Checkpoint, stats: Stats, *, alpha: float = ALPHA, progress: Progress = silent) -> Rescaling:
    """The scales of every norm of a block; `check` has been called."""
    scales: dict[Place, torch.Tensor] = {}
    for layer in range(source.numbers.layers):
        progress(layer, source.numbers.layers, f"scales of layer {layer}")
        for place in _places(source, layer):
            scale = scale_at(source, stats, place, alpha)
            assert scale is not None
            scales[place] = scale
    return Rescaling(scales, {place_name(place): {"alpha": alpha} for place in scales})
