"""All cores for work that goes chunk by chunk, in constant memory and in the order of the input."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 5_000
"""Items in a chunk: enough to outweigh sending it to another process, and the same for any number
of workers, so that no outcome can depend on it."""


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of CHUNK items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Apply a function in several processes; results come in the order of the items.

    No more items are taken than the workers need, so that neither input nor output piles up.

    Args:
        function: picklable, as are items and results.
        workers: with 1, everything happens in this process.

    Raises:
        Exception: whatever `function` raises; what is not begun then is not begun.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_interrupt
    )
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    """Ctrl-C reaches all processes; the first one ends the others, without their tracebacks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
