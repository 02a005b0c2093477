"""This machine: its cores, its memory's speed, and the instruction sets of this build that it can run."""

from __future__ import annotations

from rondel.native.library import check, ffi, lib


def cpu_count() -> int:
    """Cores this process may use: affinity and control group counted."""
    return int(lib.rondel_cpu_count())


def read_bandwidth(threads: int, size: int = 1 << 28) -> float:
    """Bytes a second that `threads` read from a buffer of `size` bytes, the best of several passes."""
    rate = float(lib.rondel_read_bandwidth(threads, size))
    check(0 if rate >= 0 else -1)
    return rate


def instruction_sets() -> list[str]:
    """The instruction sets of this build that this processor can run, best first."""
    count = lib.rondel_isa_count()
    return [ffi.string(lib.rondel_isa_name(i)).decode() for i in range(count) if lib.rondel_isa_usable(i)]


def instruction_set() -> str:
    """The one in use."""
    return str(ffi.string(lib.rondel_isa_current()).decode())


def use_instruction_set(name: str) -> None:
    """Switch, for tests and benchmarks; not while a session evaluates. Raises `NativeError` for one that cannot run."""
    check(lib.rondel_isa_use(name.encode()))
