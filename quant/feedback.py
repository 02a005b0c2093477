"""Error feedback: a matrix is rounded block after block so that its outputs, not its weights, stay what they were.

The error made least is tr((W - Q) H (W - Q)^T), H the second moment of the matrix's inputs. A first pass rounds columns
in turn and takes each error out of the columns behind it (Frantar et al. 2023, GPTQ; Chee et al. 2023, QuIP: LDLQ); the
sweeps after it round every column again with all others as they are, and fit the scales again (coordinate descent,
Behdin et al. 2023, QuantEase). Rows do not know of each other: pieces of rows go to workers, and the bytes do not
depend on how many workers there are.
"""

from __future__ import annotations

import numpy as np
import torch

from rondel.native.formats import Bytes, decode, encode_feedback, format_bytes, formats, polish
from rondel.quant.factorization import Factor
from rondel.quant.workers import Workers

PULL = 0.5  # of the way to the target drawn by the float stream: the whole way also follows what is chance in the text
COLUMNS = 512  # of a drift multiplied at a time
PIECE = 256  # rows that one worker rounds at a time; a multiple of a tile's panel
SWEEPS = 3  # of coordinate descent; the third takes about 2 % off the error, the fourth less than 1 %


def drawn_target(weights: torch.Tensor, factor: Factor, drift: torch.Tensor) -> torch.Tensor:
    """The weights (rows, cols) that answer the quantized prefix's inputs more as `weights` do the float model's.

    `drift` (cols, cols) is C - H: the mean of x_float x_quantized^T less that of x_quantized x_quantized^T. W C H^-1
    answers for all errors of the layers before (Li et al. 2025, GPTAQ), and PULL of the way to it is taken.
    """
    whole = weights.to(torch.float64)
    moved, answer = torch.zeros_like(whole), torch.zeros_like(whole)
    # Some rows of drift and of U at a time: whole in float64 they would be as large as all else together.
    for first in range(0, len(drift), COLUMNS):
        some = slice(first, first + COLUMNS)
        moved += whole[:, some] @ drift[some].to("cpu", torch.float64)
    for first in range(0, len(drift), COLUMNS):
        upper = factor.upper[first : first + COLUMNS].to(torch.float64)
        answer += moved @ upper.T @ upper
    return (whole + PULL * answer).to(torch.float32)


def feed_back(
    weights: torch.Tensor,
    factor: Factor,
    format: str,
    workers: Workers,
    *,
    target: torch.Tensor | None = None,
    sweeps: int = SWEEPS,
) -> Bytes:
    """The packed bytes of `weights` (rows, cols) F32 in `format`, for inputs with the second moment of `factor`.

    `target`, of `drawn_target`, is what to come near to instead of the weights. Raises NativeError for weights that are
    not finite or too large for the format.
    """
    weights = weights if target is None else target
    pieces = [weights[first : first + PIECE] for first in range(0, len(weights), PIECE)]
    return np.concatenate(list(workers.map(lambda piece: _Piece(piece, factor, format).rounded(sweeps), pieces)))


class _Piece:
    """Some rows of a matrix on their way to packed bytes."""

    def __init__(self, weights: torch.Tensor, factor: Factor, format: str) -> None:
        self.weights = weights.to(torch.float32)
        self.factor = factor
        self.format = format
        self.block = formats()[format].block
        self.starts = range(0, weights.shape[1], self.block)

    def rounded(self, sweeps: int) -> Bytes:
        packed = self._first_pass()
        if sweeps:
            self._polish(packed, sweeps)
        stored = format_bytes(self.format, 1, self.block)  # one row alone takes as much as a whole panel
        return np.stack([part.reshape(-1, stored) for part in packed], axis=1).reshape(-1)

    def _first_pass(self) -> list[Bytes]:
        """Packed blocks of columns; every block's errors are taken out of the columns behind it."""
        left, upper, packed = self.weights.clone(), self.factor.upper, []
        for start in self.starts:
            stop = start + self.block
            inside = upper[start:stop, start:stop].contiguous()
            importance = inside.diagonal().square().reciprocal()
            codes, errors = encode_feedback(
                self.format, left[:, start:stop].contiguous().numpy(), importance.numpy(), inside.numpy()
            )
            packed.append(codes)
            left[:, stop:] -= torch.from_numpy(errors) @ upper[start:stop, stop:]
        return packed

    def _decoded(self, packed: Bytes) -> torch.Tensor:
        return torch.from_numpy(decode(self.format, packed, len(self.weights), self.block))

    def _polish(self, packed: list[Bytes], sweeps: int) -> None:
        """Coordinate descent over all blocks, in place."""
        moments = self.factor.moments
        decoded = [self._decoded(part) for part in packed]
        gradient = (self.weights - torch.cat(decoded, 1)) @ moments
        for _ in range(sweeps):
            for index, start in enumerate(self.starts):
                stop = start + self.block
                inside = moments[start:stop, start:stop].contiguous().numpy()
                packed[index] = polish(self.format, packed[index], gradient[:, start:stop].contiguous().numpy(), inside)
                moved = self._decoded(packed[index])
                gradient -= (moved - decoded[index]) @ moments[start:stop]
                decoded[index] = moved
