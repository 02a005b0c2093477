"""Owns a packed matrix as numbers that can be fitted: float16 block scales, and the whole numbers that formats allow.

Behind each whole number (a code, an inner scale, an inner min) stands a real number, behind each codeword a vector. The
forward pass rounds it, and the gradient passes as if it did not (straight-through, Bengio et al. 2013): what most steps
push the same way becomes its neighbour. Format and size stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rondel.converters.folder import Packed
from rondel.quant.block_codes import Kind, read_numbers, with_numbers
from rondel.quant.block_scales import BlockScales
from rondel.quant.codewords import codebook
from rondel.quant.descent import Leaf


@dataclass(frozen=True)
class Rates:
    """Adam's learning rates: of factors near one, and of whole numbers, in units of their steps."""

    factors: float
    codes: float
    inner: float  # inner scales and mins


class _Through(torch.autograd.Function):
    """Gives `chosen`; the gradient goes to `real` as if the two were the same."""

    @staticmethod
    def forward(context: Any, real: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return chosen

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class FittedMatrix:
    """One packed matrix (rows, cols) whose format has float16 block scales."""

    def __init__(self, packed: Packed, device: torch.device, dtype: torch.dtype) -> None:
        self.packed = packed
        self._blocks = BlockScales(packed)
        self._numbers = read_numbers(packed)
        self.reals = {
            kind: torch.from_numpy(numbers.values).to(device, dtype) for kind, numbers in self._numbers.items()
        }
        self._scales = self._blocks.scales.to(device, dtype)
        self.factors = torch.ones_like(self._scales)
        self._codebook = codebook(packed.format)
        if self._codebook:
            self._chosen = self._codebook.read(packed).to(device, dtype)
            self.reals["codes"] = self._chosen / self._codebook.step
        elif "codes" not in self._numbers:
            self._pattern = self._undivided().to(device, dtype)

    def leaves(self, rates: Rates) -> list[Leaf]:
        """Everything that is fitted, with its rate."""
        reals = [Leaf(real, rates.codes if kind == "codes" else rates.inner) for kind, real in self.reals.items()]
        return [Leaf(self.factors, rates.factors), *reals]

    def weight(self) -> torch.Tensor:
        """The matrix (rows, cols), differentiable in the leaves."""
        halves = (self._scales * self.factors).flatten(1)[..., None]  # (d or d and m, blocks, 1)
        scale = halves[0] * self._meant("scales") if "scales" in self.reals else halves[0]
        codes = self._meant("codes") if "codes" in self.reals else self._pattern
        weight = codes.reshape(*scale.shape, -1) * scale[..., None]
        if len(halves) > 1:
            least = -halves[1] * self._meant("mins") if "mins" in self.reals else halves[1]
            weight = weight + least[..., None]
        return weight.reshape(self.packed.shape)

    def bound(self) -> None:
        """Bring the reals back between their ends: beyond, they would have to return before they count."""
        for kind, real in self.reals.items():
            if kind in self._numbers:
                real.detach().clamp_(0, self._numbers[kind].top)
            elif self._codebook:
                largest = float(self._codebook.words.max()) / self._codebook.step
                real.detach().clamp_(-largest, largest)

    def stored(self) -> Packed:
        """The matrix as it is stored; float16 rounds the block scales."""
        packed = self._blocks.fold(self._scales * self.factors)
        whole = {kind: self.reals[kind].detach().round().cpu().numpy().astype(np.int32) for kind in self._numbers}
        if whole:
            packed = with_numbers(packed, whole)
        return self._codebook.write(packed, self._codewords()) if self._codebook else packed

    def _meant(self, kind: Kind) -> torch.Tensor:
        """What the numbers or codewords of a kind stand for."""
        real = self.reals[kind]
        if kind == "codes" and self._codebook:
            return self._codebook.step * _Through.apply(real, self._codewords() / self._codebook.step)
        numbers = self._numbers[kind]
        return numbers.unit * (_Through.apply(real, real.detach().round()) + numbers.zero)

    def _codewords(self) -> torch.Tensor:
        """The nearest codewords (eights, 8); they are looked for only where another one than the last can be nearer."""
        assert self._codebook is not None
        wanted = self.reals["codes"].detach() * self._codebook.step
        far = (wanted - self._chosen).square().sum(1) > self._codebook.safe**2
        if far.any():
            self._chosen = self._chosen.clone()
            self._chosen[far] = self._codebook.nearest(wanted[far])
        return self._chosen

    def _undivided(self) -> torch.Tensor:
        """(blocks, columns): what d and the inner scales multiply, of a format whose codes are neither."""
        if "scales" not in self._numbers:
            return self._blocks.parts[0].flatten(0, 1)
        scales = self._numbers["scales"]
        plain = int(1 - scales.zero) if scales.unit == 1 else 0
        alike = with_numbers(self.packed, {"scales": np.full_like(scales.values, plain)})
        return BlockScales(alike).parts[0].flatten(0, 1) / (scales.unit * (plain + scales.zero))
