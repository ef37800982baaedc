"""All cores for work that goes chunk by chunk, in constant memory and in the order of the input."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
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

    No more items are taken than the workers need, so that neither input nor output piles up:
    joblib.Parallel reads ahead of a slow consumer without limit.

    Args:
        function: picklable, as are items and results.
        workers: with 1, or with a single item, everything happens in this process.

    Raises:
        Exception: whatever `function` raises; what is not begun then is not begun.
    """
    if workers == 1:
        yield from map(function, items)
        return
    remaining = iter(items)
    begun = list(islice(remaining, 2))
    if len(begun) < 2:  # processes take longer to start than to work on one chunk
        yield from map(function, begun)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
    )
    waiting: deque[Future[R]] = deque()
    try:
        for item in chain(begun, remaining):
            with _interrupts_held_back():
                waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """What is started meanwhile never sees Ctrl-C: this process alone ends all the others."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """A process of the pool would wait for ever if the one that feeds it was killed."""

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
