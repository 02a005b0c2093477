"""Owns the gain control: the branches that copies would run again, scaled and not run again.

Most of what a fitted copy seems to win is a gain that costs nothing. So a layer's own branches get what its copies get
(a gate, gains of the norm and of the output), by the same descent, and copies must be better than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from rondel.converters.family import block_tensor
from rondel.quant.descent import Leaf, open_workers
from rondel.quant.distill import GAIN_RATE, GATE_RATE, Distillation
from rondel.quant.student import Student, base_path
from rondel.quant.workers import Workers

NORM_AND_OUTPUT = {"attn": ("attn_norm", "attn_output"), "ffn": ("ffn_norm", "ffn_down")}
BATCH = 4  # windows a step, as of the copies


def fit_gains(
    student: Student,
    teacher: Student,
    windows: torch.Tensor,
    branches: Iterable[tuple[int, str]],
    config: Any,
    *,
    workers: Workers | None = None,
) -> dict[str, torch.Tensor]:
    """Weights for the student's methods with fitted gains of `branches`, (layer, "attn" or "ffn") each.

    Of `config`: steps and seed, as of fit_copies.
    """
    found = sorted(set(branches))
    gates = {branch: torch.ones(1, device=student.device, dtype=student.dtype) for branch in found}
    gains = {
        (branch, place): torch.ones(student.numbers.width, device=student.device, dtype=student.dtype)
        for branch in found
        for place in ("norm", "output")
    }

    def weights() -> dict[str, torch.Tensor]:
        made = {}
        for branch in found:
            norm, output = (block_tensor(branch[0], role) for role in NORM_AND_OUTPUT[branch[1]])
            made[norm] = student.tensors[norm] * gains[branch, "norm"]
            made[output] = student.tensors[output] * (gates[branch] * gains[branch, "output"])[:, None]
        return made

    fit = Distillation(
        student, teacher, windows, base_path(student.layers), {layer for layer, _ in found}, weights=weights
    )
    leaves = [Leaf(gate, GATE_RATE) for gate in gates.values()] + [Leaf(gain, GAIN_RATE) for gain in gains.values()]
    with open_workers(workers) as crew:
        fit.descend(leaves, config.steps, getattr(config, "batch", BATCH), config.seed, crew)
    return {name: weight.detach() for name, weight in weights().items()}
