"""Measures the runtime's Hadamard transform: cycles an element by size, and what R4 adds to a decode step at 2 bits.

Cycles are seconds times the clock, which a chain of additions shows. The instruction sets take turns, and the least
time of many rounds counts: what another program took of the core or its caches in a round does not.
In parentheses is what the additions alone would take on a core that begins two vectors of them in a cycle: a base of
order m takes m / 4 + 3 an element (sums of four inputs, then one for every four), Sylvester's factor its log2. Orders
from 68 up stay far from it: their sums lie in a cache, and every addition reads its address from a table.
The share of a decode step is a ratio of times taken in turn: the transform of one hidden row, and the three Q2_K
products of its layer.

    python -m benchmarks.hadamard [--rounds 1600] [--width 5120] [--hidden 25600] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from math import inf, log2, prod
from statistics import median
from typing import Any

import numpy as np

from rondel.native import instruction_set, instruction_sets, use_instruction_set
from rondel.native.formats import matmul
from rondel.native.library import check, check_handle, ffi, lib
from rondel.quant.hadamard import hadamard_plan
from tests.packed import random_packed

POWERS = [2**k for k in range(6, 15)]
# Widths and hidden layers of models, of those that differ in powers of two alone one, and one in blocks.
HIDDENS = [
    *(
        (n, n)
        for n in (1536, 2560, 3584, 5632, 8960, 9728, 10944, 11008, 13824, 14336, 17408, 18432, 18944, 25600, 29568)
    ),
    (25600, 1024),
]
LANES = {"avx2": 8, "avx512": 16, "scalar": 1}
SWEEPS = 8
CHANNELS = 4096  # of a timed call at least: small rows stay in the first cache, and a call costs little beside them


class Transform:
    """x <- H (s o x) / sqrt(block) on rows of `size` channels, in place: the norm stays, so x can be used again."""

    def __init__(self, size: int, block: int) -> None:
        signs = np.random.default_rng(0).integers(0, 256, (size + 7) // 8).astype(np.uint8).tobytes()
        self._made = ffi.gc(check_handle(lib.rondel_hadamard_new(size, block, signs, 0)), lib.rondel_hadamard_free)

    def __call__(self, rows: np.ndarray) -> None:
        """Turn (n, size) float32."""
        check(lib.rondel_hadamard_rows(self._made, ffi.from_buffer("float[]", rows, require_writable=True), len(rows)))


def aligned(values: np.ndarray) -> np.ndarray:
    """The values at an address that 64 divides, as the runtime's own rows are."""
    memory = np.empty(values.nbytes + 64, np.uint8)
    skipped = -memory.ctypes.data % 64
    rows = memory[skipped : skipped + values.nbytes].view(values.dtype).reshape(values.shape)
    rows[:] = values
    return rows


def seconds(call: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    """Time of one call."""
    start = time.perf_counter()
    call(*arguments, **options)
    return time.perf_counter() - start


def cycles_of(size: int, block: int, rounds: int, sets: list[str]) -> list[float]:
    """Cycles an element: the least time of each set, less that of a call without rows, at the fastest clock seen."""
    transform = Transform(size, block)
    rows = aligned(np.random.default_rng(1).standard_normal((max(1, CHANNELS // size), size)).astype(np.float32))
    spent, empty, clock = dict.fromkeys(sets, inf), inf, 0.0
    for _ in range(rounds):
        for isa in sets:
            use_instruction_set(isa)
            transform(rows)  # brings the code and the rows into the caches
            spent[isa] = min(spent[isa], seconds(transform, rows))
            empty = min(empty, seconds(transform, rows[:0]))
        clock = max(clock, lib.rondel_clock_rate())
    return [(spent[isa] - empty) * clock / rows.size for isa in sets]


def bound_of(block: int, isa: str) -> float:
    """Cycles of the additions alone, two vectors a cycle."""
    plan = hadamard_plan(block)
    assert plan is not None
    additions = sum(order / 4 + 3 for order in plan.bases) + log2(block // prod(plan.bases))
    return additions / (2 * LANES[isa])


def print_cycles(rounds: int) -> None:
    """A table of cycles an element: a row a size, a column an instruction set.

    All sizes are measured in several sweeps: what slows the machine for some seconds then slows no size every time.
    """
    before, fast = instruction_set(), [isa for isa in instruction_sets() if isa != "scalar"] or ["scalar"]
    print("| channels | block |" + "".join(f" {isa} |" for isa in fast))
    print("|---:|---:|" + "---:|" * len(fast))
    least: dict[tuple[int, int], list[float]] = {}
    for _ in range(SWEEPS):
        for case in [*((size, size) for size in POWERS), *HIDDENS]:
            found = cycles_of(*case, -(-rounds // SWEEPS), fast)
            least[case] = [*map(min, least.get(case, found), found)]
    for (size, block), cycles in least.items():
        cells = (f" {one:.2f} ({bound_of(block, isa):.2f}) |" for one, isa in zip(cycles, fast, strict=True))
        print(f"| {size} | {block} |{''.join(cells)}")
    use_instruction_set(before)


def print_share(width: int, hidden: int, rounds: int, threads: int) -> None:
    """Time of R4 over that of the layer's three products at 2.6 bits a weight, for one token."""
    random = np.random.default_rng(2)
    shapes = [(hidden, width), (hidden, width), (width, hidden)]
    gate, up, down = (random_packed("Q2_K", *shape, random) for shape in shapes)
    x = random.standard_normal((1, width)).astype(np.float32)
    for block in (hidden, hidden & -hidden):
        transform, pairs = Transform(hidden, block), []
        for _ in range(rounds):
            products = seconds(matmul, "Q2_K", gate, hidden, width, x, threads=threads)
            products += seconds(matmul, "Q2_K", up, hidden, width, x, threads=threads)
            y = aligned(random.standard_normal((1, hidden)).astype(np.float32))
            turning = seconds(transform, y)
            products += seconds(matmul, "Q2_K", down, width, hidden, y, threads=threads)
            pairs.append((turning, products))
        turning, products = (median(column) for column in zip(*pairs, strict=True))
        share = median(turn / product for turn, product in pairs)
        print(
            f"R4 of {hidden} channels in blocks of {block}: {turning * 1e6:.0f} us beside {products * 1e3:.2f} ms, "
            f"{100 * share:.2f} % of a {width}-wide layer at Q2_K on {threads} thread(s)"
        )


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description="The Hadamard transform's cycles, and its share of a decode step.")
    parser.add_argument("--rounds", type=int, default=1600)
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--hidden", type=int, default=25600)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    print_cycles(arguments.rounds)
    print_share(arguments.width, arguments.hidden, max(arguments.rounds // 40, 3), arguments.threads)


if __name__ == "__main__":
    main()
