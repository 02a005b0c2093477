"""Owns Hadamard matrices: exact constructions, the canonical plan for a size, the fast transform, and random signs.

The plan and the order of the axes are part of the file format (formats.md, section 3): `native/src/hadamard.c` derives
the same ones, so a rotation fused here can be undone online there. Amended before 1.0: squares of primes, order 172.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from rondel.converters.rotation import ORTHOGONAL, Rotation

# A base matrix is applied densely: its order is its cost in additions an element. Past this, blocks are better value.
MAX_BASE_ORDER = 256
SYLVESTER_LOG2 = 5  # of a dense factor of the power of two
# 43 divides the hidden layers of some models, and no Paley matrix has an order 43 * 2^k: Williamson's of order 172. All
# solutions that are constant on the classes were searched for; there is one, up to the choice of the generator.
WILLIAMSON_ORDER = 172
WILLIAMSON_CLASSES = 7
WILLIAMSON_MASKS = (7, 25, 44, 77)  # bit i: -1 on class i


@dataclass(frozen=True)
class HadamardPlan:
    """H = H_b1 (x) H_b2 (x) ... (x) Sylvester 2^log2, bases ascending; the last factor runs along adjacent channels."""

    bases: tuple[int, ...]
    log2: int

    @property
    def additions(self) -> int:
        """Additions and subtractions an element."""
        return sum(self.bases) + self.log2


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@cache
def base_orders() -> tuple[int, ...]:
    """The orders up to MAX_BASE_ORDER that have a construction here, without the powers of two."""
    candidates = (order for order in range(4, MAX_BASE_ORDER + 1, 4) if not _is_power_of_two(order))
    return tuple(order for order in candidates if order == WILLIAMSON_ORDER or _paley_field(order))


def _paley_field(order: int) -> int:
    """The size q of Paley's field, 0: none. Type I: q = order - 1 = 3 mod 4, a prime.

    Type II, where there is no type I: q = order / 2 - 1 = 1 mod 4, a prime or the square of one.
    """
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if order % 4 == 0 and half % 4 == 1 and (_is_prime(half) or _is_prime(_root(half))) else 0


def _root(number: int) -> int:
    """The square root of a square, else 0."""
    root = math.isqrt(number)
    return root if root * root == number else 0


@cache
def base_matrix(order: int) -> torch.Tensor:
    """A Hadamard matrix of a base order, (order, order) int8, entries +1 and -1: Paley's (1933) or Williamson's (1944).

    With Q the differences' characters, Paley I is I + [[0, 1], [-1, Q]]; Paley II puts [[1, -1], [-1, -1]] for the
    zeros and +-[[1, 1], [1, -1]] for the other entries of [[0, 1], [1, Q]].
    """
    if order == WILLIAMSON_ORDER:
        return _williamson_matrix()
    q = _paley_field(order)
    assert q, f"no Hadamard matrix of order {order}"
    core = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    core[0, 1:] = 1
    core[1:, 1:] = _characters(q)
    if q == order - 1:
        core[1:, 0] = -1
        return core + torch.eye(order, dtype=torch.int8)
    core[1:, 0] = 1
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(core, pair) + torch.kron(torch.eye(q + 1, dtype=torch.int8), zero)


def _characters(q: int) -> torch.Tensor:
    """Q[i, j] = chi(i - j), (q, q) int8: 0, 1 for the squares of GF(q), -1 for the rest.

    In GF(p^2) the element i stands for a + b sqrt(r) with (a, b) = divmod(i, p) and r the least non-square of p; it is
    a square where its norm a^2 - r b^2 is one of p.
    """
    p = _root(q) or q
    squares = {i * i % p for i in range(1, p)}
    chi = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, p)], dtype=torch.int8)
    indices = torch.arange(q)
    if p == q:
        return chi[(indices[:, None] - indices[None, :]) % p]
    r = next(i for i in range(2, p) if i not in squares)
    a, b = (part[:, None] - part[None, :] for part in (indices // p, indices % p))
    return chi[(a * a - r * b * b) % p]


def _williamson_matrix() -> torch.Tensor:
    """Four symmetric circulant matrices with A^2 + B^2 + C^2 + D^2 = 172 I in Williamson's array.

    Their first rows are 1 at 0 and constant on the seven classes {3^k : k = i mod 7} of 43.
    """
    p = WILLIAMSON_ORDER // 4
    classes = {pow(3, k, p): k % WILLIAMSON_CLASSES for k in range(p - 1)}
    indices = torch.arange(p)
    differences = (indices[:, None] - indices[None, :]) % p
    a, b, c, d = (
        torch.tensor([1] + [1 - 2 * (mask >> classes[i] & 1) for i in range(1, p)], dtype=torch.int8)[differences]
        for mask in WILLIAMSON_MASKS
    )
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, 1) for row in rows])


@cache
def hadamard_plan(size: int) -> HadamardPlan | None:
    """The cheapest plan for a size (ties: fewer bases, then the lexicographically first); None: there is none."""
    best: tuple[int, int, tuple[int, ...]] | None = None

    def search(rest: int, first: int, chosen: tuple[int, ...]) -> None:
        nonlocal best
        if _is_power_of_two(rest):
            found = (sum(chosen) + rest.bit_length() - 1, len(chosen), chosen)
            best = found if best is None else min(best, found)
            return
        for order in base_orders():
            if order >= first and rest % order == 0:
                search(rest // order, order, (*chosen, order))

    search(size, 0, ())
    if best is None:
        return None
    product = 1
    for order in best[2]:
        product *= order
    return HadamardPlan(best[2], (size // product).bit_length() - 1)


def largest_block(size: int) -> int:
    """The largest divisor of a size that has a plan: the block of its block-diagonal Hadamard matrix.

    `size` itself for nearly every model; 4 for 92 = 4 * 23, whose matrix needs another construction than these.
    """
    return max(divisor for divisor in range(1, size + 1) if size % divisor == 0 and hadamard_plan(divisor))


def hadamard_transform(x: torch.Tensor, block: int, *, transposed: bool = False) -> torch.Tensor:
    """H x / sqrt(block), or H^T x, on each block of the last axis, in the precision of x (float32 or float64)."""
    plan = hadamard_plan(block)
    assert plan is not None, f"no Hadamard matrix of order {block}"
    assert x.shape[-1] % block == 0, f"blocks of {block} do not divide {x.shape[-1]} channels"
    y, inner = x, block
    for factor in (*(base_matrix(order) for order in plan.bases), *_sylvester_factors(plan.log2)):
        inner //= len(factor)
        matrix = (factor.T if transposed else factor).to(x.device, x.dtype)
        # The last factor runs along adjacent channels: one product of two matrices instead of many small ones.
        y = matrix @ y.reshape(-1, len(factor), inner) if inner > 1 else y.reshape(-1, len(factor)) @ matrix.T
    return y.reshape(x.shape) / block**0.5


@cache
def _sylvester_factors(log2: int) -> tuple[torch.Tensor, ...]:
    """Sylvester 2^log2 as factors of at most 2^SYLVESTER_LOG2, int8: dense products outrun butterflies here."""
    if log2 == 0:
        return ()
    step = min(log2, SYLVESTER_LOG2)
    two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    factor = two
    for _ in range(step - 1):
        factor = torch.kron(factor, two)
    return (factor, *_sylvester_factors(log2 - step))


def random_signs(size: int, seed: int, site: str) -> str:
    """One bit a channel (1 = minus), least significant first, as hexadecimal text: a SHA-256 stream of seed and site.

    A hash and not a generator of some library, so that a seed means the same rotation for ever.
    """
    stream = b""
    while len(stream) * 8 < size:
        stream += hashlib.sha256(f"rondel signs 1|{seed}|{site}|{len(stream)}".encode()).digest()
    packed = bytearray(stream[: (size + 7) // 8])
    if size % 8:
        packed[-1] &= (1 << size % 8) - 1
    return bytes(packed).hex()


def pack_signs(signs: torch.Tensor) -> str:
    """The hexadecimal text of signs (size,) of +1 and -1: the inverse of `unpack_signs`."""
    packed = bytearray((len(signs) + 7) // 8)
    for i, sign in enumerate(signs.tolist()):
        packed[i // 8] |= (sign < 0) << i % 8
    return bytes(packed).hex()


@lru_cache(maxsize=16)  # a stage asks for the same few signs once a chunk
def unpack_signs(signs: str, size: int) -> torch.Tensor:
    """The signs of a record as +1 and -1, (size,) float64; not to be written to."""
    packed = bytes.fromhex(signs)
    assert len(packed) == (size + 7) // 8, f"{len(packed)} bytes of signs for {size} channels"
    bits = torch.tensor([packed[i // 8] >> i % 8 & 1 for i in range(size)], dtype=torch.float64)
    return 1.0 - 2.0 * bits


def rotate_channels(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """The map that a record means, on the last axis of x, which holds the channels of the rotation's site."""
    assert x.shape[-1] == rotation.size, f"{x.shape[-1]} channels for a rotation of {rotation.size}"
    if rotation.kind == ORTHOGONAL:
        return _multiply(x, rotation)
    signs = unpack_signs(rotation.signs, rotation.size).to(x.dtype).to(x.device)
    return hadamard_transform(x * signs, rotation.block)


def rotate_channels_back(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """The inverse of `rotate_channels`: s o (H^T x) / sqrt(block), or x M^T, on each block of the last axis."""
    assert x.shape[-1] == rotation.size, f"{x.shape[-1]} channels for a rotation of {rotation.size}"
    if rotation.kind == ORTHOGONAL:
        return _multiply(x, rotation, transposed=True)
    signs = unpack_signs(rotation.signs, rotation.size).to(x.dtype).to(x.device)
    return hadamard_transform(x, rotation.block, transposed=True) * signs


def _multiply(x: torch.Tensor, rotation: Rotation, *, transposed: bool = False) -> torch.Tensor:
    """x M or x M^T on each block, the blocks in equal runs of one matrix each."""
    assert rotation.matrix is not None, f"the matrix of the rotation of {rotation.site} was not read"
    matrix = (rotation.matrix.mT if transposed else rotation.matrix).to(x.device, x.dtype)
    count, block, _ = matrix.shape
    runs = x.reshape(-1, count, rotation.size // (count * block), block).transpose(0, 1)  # (n, rows, in a run, block)
    turned = (runs.reshape(count, -1, block) @ matrix).reshape(runs.shape)
    return turned.transpose(0, 1).reshape(x.shape)
