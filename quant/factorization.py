"""Owns the factor of a second moment that error feedback needs, made with little memory: moments are what is largest.

At the widest site of a model one float64 matrix (cols, cols) outweighs a whole block's weights. So one array holds the
moment in its upper half and the factor, later its inverse, in its lower half, and LAPACK only ever sees one panel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

DAMPING = 0.01  # of the mean of the diagonal, added to it: what a finite text did not show is not certain to be zero
DAMPING_STEP = 10.0  # more of it, where the second moment still has no Cholesky factor
DAMPING_MOST = 1e4
PANEL = 512  # columns of a factor made at a time
SWAPPED = 1 << 22  # numbers swapped at a time where a matrix is turned round


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
    diagonal = turned.diagonal().flip(0).clone()
    mean = diagonal.mean().item()
    _turn_round(turned)
    damping = DAMPING * mean if mean > 0 else 1.0
    most = DAMPING_MOST * max(mean, 1.0)
    while damping <= most:
        damped = diagonal + damping
        turned.diagonal().copy_(damped)
        if _factor_lower(turned):
            _invert_lower(turned)
            upper = _turned_back(turned, None)
            if bool(torch.isfinite(upper).all()):
                return Factor(_turned_back(turned, damped), upper)
        _restore_lower(turned)
        damping *= DAMPING_STEP
    raise ArithmeticError("the second moment has no factor at any damping")


def _panels(first: int, last: int) -> Iterator[slice]:
    for start in range(first, last, PANEL):
        yield slice(start, min(start + PANEL, last))


def _turn_round(matrix: torch.Tensor) -> None:
    """Reverse the order of rows and of columns, in place."""
    flat = matrix.view(-1)
    for first in range(0, len(flat) // 2, SWAPPED):
        front = flat[first : min(first + SWAPPED, len(flat) // 2)]
        back = flat[len(flat) - first - len(front) : len(flat) - first]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def _factor_lower(matrix: torch.Tensor) -> bool:
    """Put the Cholesky factor L of a symmetric matrix into its lower half, panel by panel; False where there is none.

    Above the diagonal everything stays as it is.
    """
    size = len(matrix)
    for here in _panels(0, size):
        corner, failed = torch.linalg.cholesky_ex(matrix[here, here])
        if failed.item():
            return False
        matrix[here, here] = corner + matrix[here, here].triu(1)
        for rows in _panels(here.stop, size):
            matrix[rows, here] = torch.linalg.solve_triangular(corner.T, matrix[rows, here], upper=True, left=False)
        for rows in _panels(here.stop, size):
            matrix[rows, here.stop : rows.start] -= matrix[rows, here] @ matrix[here.stop : rows.start, here].T
            matrix[rows, rows] -= (matrix[rows, here] @ matrix[rows, here].T).tril()
    return True


def _invert_lower(matrix: torch.Tensor) -> None:
    """Invert the triangle in the lower half in place, from the last panel to the first."""
    size = len(matrix)
    for here in reversed(list(_panels(0, size))):
        unit = torch.eye(here.stop - here.start, dtype=matrix.dtype, device=matrix.device)
        # Reads the lower half alone, as all of these do: above the diagonal stands the moment.
        corner = torch.linalg.solve_triangular(matrix[here, here], unit, upper=False)
        below = matrix[here.stop :, here] @ corner
        for rows in _panels(here.stop, size):
            behind = slice(rows.start - here.stop, rows.stop - here.stop)
            made = matrix[rows, rows].tril() @ below[behind]
            matrix[rows, here] = -(made + matrix[rows, here.stop : rows.start] @ below[: behind.start])
        matrix[here, here] = corner + matrix[here, here].triu(1)


def _restore_lower(matrix: torch.Tensor) -> None:
    """The lower half from the upper one."""
    for here in _panels(0, len(matrix)):
        matrix[here.stop :, here] = matrix[here, here.stop :].T
        matrix[here, here] = matrix[here, here].triu(1) + matrix[here, here].triu(1).T


def _turned_back(matrix: torch.Tensor, diagonal: torch.Tensor | None) -> torch.Tensor:
    """One half in float32, its order of rows and columns turned back: the symmetric matrix of the upper half and a
    diagonal (cols,), or where none is given the triangle in the lower half."""
    size = len(matrix)
    back = torch.zeros(size, size)
    for here in _panels(0, size):
        rows = matrix[here, :].clone()
        if diagonal is None:
            rows[:, here.stop :] = 0
            rows[:, here] = rows[:, here].tril()
        else:
            above = rows[:, here].triu(1)
            rows[:, : here.start] = matrix[: here.start, here].T
            rows[:, here] = above + above.T + diagonal[here].diag()
        back[size - here.stop : size - here.start] = rows.flip(0, 1).to("cpu", torch.float32)
    return back
