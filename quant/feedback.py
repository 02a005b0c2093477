"""Error feedback: a matrix is rounded block after block so that its outputs, not its weights, stay what they were.

The error made least is tr((W - Q) H (W - Q)^T), H the second moment of the matrix's inputs. A first pass rounds columns
in turn and takes each error out of the columns behind it (Frantar et al. 2023, GPTQ; Chee et al. 2023, QuIP: LDLQ); the
sweeps after it round every column again with all others as they are, and fit the scales again (coordinate descent,
Behdin et al. 2023, QuantEase). Rows do not know of each other: pieces of rows go to workers, and the bytes do not
depend on how many workers there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rondel.native.formats import Bytes, decode, encode_feedback, format_bytes, formats, polish
from rondel.quant.workers import Workers

PULL = 0.5  # of the way to the target drawn by the float stream: the whole way also follows what is chance in the text
DAMPING = 0.01  # of the mean of the diagonal, added to it: what a finite text did not show is not certain to be zero
DAMPING_STEP = 10.0  # more of it, where the second moment still has no Cholesky factor
DAMPING_MOST = 1e4
COLUMNS = 512  # of an inverse computed at a time
SWAPPED = 1 << 22  # numbers swapped at a time where a matrix is turned round
PIECE = 256  # rows that one worker rounds at a time; a multiple of a tile's panel
SWEEPS = 3  # of coordinate descent; the third takes about 2 % off the error, the fourth less than 1 %


@dataclass(frozen=True)
class Factor:
    """A damped second moment H (cols, cols) and the upper triangular U of its inverse = U^T U, both float32."""

    moments: torch.Tensor
    upper: torch.Tensor


def factorize(moments: torch.Tensor, *, device: str = "cpu") -> Factor:
    """Factor the second moment (cols, cols) of a matrix's inputs. One in float64 is used up: few arrays are as large.

    Columns that saw nothing, and moments of too few tokens, are dampened until the factor exists.
    """
    # H = R R^T with R upper triangular is the Cholesky factor of H with its order of columns turned round.
    turned = moments.to(device, torch.float64).contiguous()
    mean = turned.diagonal().mean().item()
    _turn_round(turned)
    damping, added = DAMPING * mean if mean > 0 else 1.0, 0.0
    most = DAMPING_MOST * max(mean, 1.0)
    while damping <= most:
        turned.diagonal().add_(damping - added)
        added = damping
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed.item():
            _invert(lower)
            inverse = lower.to("cpu", torch.float32)
            del lower
            upper = inverse.flip(0, 1)
            del inverse
            if bool(torch.isfinite(upper).all()):
                return Factor(turned.to("cpu", torch.float32).flip(0, 1), upper)
        damping *= DAMPING_STEP
    raise ArithmeticError("the second moment has no factor at any damping")


def _turn_round(matrix: torch.Tensor) -> None:
    """Reverse the order of rows and of columns, in place."""
    flat = matrix.view(-1)
    for first in range(0, len(flat) // 2, SWAPPED):
        front = flat[first : min(first + SWAPPED, len(flat) // 2)]
        back = flat[len(flat) - first - len(front) : len(flat) - first]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def _invert(lower: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place, some columns at a time from the last to the first."""
    size = len(lower)
    for first in reversed(range(0, size, COLUMNS)):
        last = min(first + COLUMNS, size)
        here, below = slice(first, last), slice(last, size)
        unit = torch.eye(last - first, dtype=lower.dtype, device=lower.device)
        corner = torch.linalg.solve_triangular(lower[here, here], unit, upper=False)
        lower[below, here] = -(lower[below, below] @ lower[below, here] @ corner)
        lower[here, here] = corner


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
