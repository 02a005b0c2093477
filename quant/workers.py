"""Owns parallel arithmetic that gives the same bits for any number of threads.

torch splits a matrix product differently for every thread count, and sums in another order then. So the work is cut
into pieces of a fixed size, each is computed by one single-threaded worker, and results come back in order.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

from rondel.converters.errors import RondelError

Item = TypeVar("Item")
Result = TypeVar("Result")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(device: str) -> None:
    """Refuses a device that torch cannot compute on, before the first long step."""
    try:
        torch.ones(1, device=device).cpu()  # both ways: the meta device takes numbers and gives none
    except (RuntimeError, AssertionError, ImportError) as error:
        raise RondelError(f"--device {device}: torch cannot use it ({str(error).splitlines()[0]})") from error


class Workers:
    """`threads` workers (None: one per usable core); while open, torch itself uses one thread."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or _usable_cores()
        self._torch_threads = 1

    def __enter__(self) -> Workers:
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._executor = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """function(item) of each item, in the items' order; at most one result a worker waits in memory."""
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(self._executor.submit(function, item))
            if len(pending) > self.threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def run(self, function: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Call function(item) for every item, which writes its own part of some result."""
        for _ in self.map(function, items):
            pass
