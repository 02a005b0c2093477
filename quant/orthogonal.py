"""Owns dense rotations: random orthogonal matrices, and the records that carry a matrix.

A dense rotation is fused only: the runtime would have to multiply by its matrix, where a Hadamard takes additions.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from rondel.converters.folder import sha256_of
from rondel.converters.rotation import ORTHOGONAL, Rotation
from rondel.quant.hadamard import rotate_channels

# Sites whose rotation may be any orthogonal matrix; RoPE and the runtime's transforms allow only some elsewhere.
DENSE_SITES = ("residual", "heads", "q_latent", "kv_latent")


def orthonormalized(matrix: torch.Tensor) -> torch.Tensor:
    """The Q of matrix = Q R with a positive diagonal of R, on the last two axes; float64, orthogonal to 1e-14."""
    q, r = torch.linalg.qr(matrix.to(torch.float64))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def random_orthogonal(count: int, size: int, seed: int, site: str) -> torch.Tensor:
    """`count` matrices (size, size) float64 from the uniform (Haar) distribution: QR of Gaussians with the signs fixed.

    Without the fix the distribution is not uniform (Mezzadri, arXiv math-ph/0609050).
    """
    digest = hashlib.sha256(f"rondel orthogonal 1|{seed}|{site}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return orthonormalized(torch.randn(count, size, size, dtype=torch.float64, generator=generator))


def dense_matrix(rotation: Rotation) -> torch.Tensor:
    """The matrix (size, size) float64 that `rotation` multiplies row vectors with."""
    return rotate_channels(torch.eye(rotation.size, dtype=torch.float64), rotation)


def with_matrix(rotation: Rotation, matrix: torch.Tensor) -> Rotation:
    """The record with matrices (n, block, block) float64 in place of the Hadamard."""
    matrix = matrix.contiguous()
    return replace(rotation, kind=ORTHOGONAL, block=matrix.shape[-1], signs="", sha256=sha256_of(matrix), matrix=matrix)
