"""One matrix rounded plainly and with error feedback: which codes are kept, judged on text held out from both."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from rondel.native.formats import Bytes, Floats, decode
from rondel.quant.importance import Means
from rondel.quant.rounding import Rounded, error_sums, six_digits

FEEDBACK, PLAIN = "gptq", "imatrix"  # how the manifest names the two ways


@dataclass
class Sums:
    """Sums of squares over a matrix: its own where nothing is rounded, else what the codes of one way miss."""

    outputs: float = 0.0  # on the text held out
    weighted: float = 0.0  # of the weights, by importance: what the report tells of every method
    weights: float = 0.0
    codes: list[Bytes] = field(default_factory=list)

    def relative(self, whole: Sums, *, looked_up: bool) -> float:
        """Relative squared error of the outputs; of a matrix that is looked up too, the errors of both uses added."""
        error = self.outputs / whole.outputs if whole.outputs > 0 else 0.0
        return error + (self.weights / whole.weights if looked_up and whole.weights > 0 else 0.0)


class Contest:
    """The codes of one matrix by plain rounding and with feedback, piece by piece, and what they miss."""

    def __init__(self, name: str, format: str, importance: Means | None, *, looked_up: bool) -> None:
        self.name = name
        self.format = format
        self.importance = importance
        self.looked_up = looked_up
        self.whole, self.plain, self.fed_back = Sums(), Sums(), Sums()

    def add(self, values: Floats, plain: Bytes, fed_back: Bytes) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Take in the codes of some rows; returns the rows and both decoded."""
        decoded = []
        for sums, codes in ((self.plain, plain), (self.fed_back, fed_back)):
            sums.codes.append(codes)
            decoded.append(decode(self.format, codes, *values.shape))
            weighted, whole = error_sums(values, decoded[-1], self.importance)
            sums.weighted += weighted
            if self.looked_up:
                sums.weights += error_sums(values, decoded[-1], None)[0]
        self.whole.weighted += whole
        if self.looked_up:
            self.whole.weights += float(np.square(values, dtype=np.float64).sum())
        return torch.from_numpy(values), [torch.from_numpy(rows) for rows in decoded]

    def decide(self) -> Rounded:
        """The codes that miss less, and what the manifest tells of both."""
        plain, fed_back = (sums.relative(self.whole, looked_up=self.looked_up) for sums in (self.plain, self.fed_back))
        kept, method = (self.fed_back, FEEDBACK) if fed_back < plain else (self.plain, PLAIN)
        error = kept.weighted / self.whole.weighted if self.whole.weighted > 0 else 0.0
        held_out = {FEEDBACK: six_digits(fed_back), PLAIN: six_digits(plain)}
        told = {"method": method, "held_out_error": held_out}
        return Rounded(np.concatenate(kept.codes), error, self.importance is not None, told)
