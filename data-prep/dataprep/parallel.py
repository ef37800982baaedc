"""All cores for work that goes chunk by chunk, in constant memory and in the order of the input."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 5_000
"""Items in a chunk: enough to outweigh sending it to another process, and the same for any number
of workers, so that no outcome can depend on it."""


def chunks(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of CHUNK items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Apply a picklable function in several processes; results come in the order of the items.

    No more items are taken than the workers need, so that neither input nor output piles up:
    joblib.Parallel reads ahead of a slow consumer without limit. With one worker, or a single item,
    everything happens in this process.
    """
    remaining = iter(items)
    begun = list(islice(remaining, 2))
    if workers == 1 or len(begun) < 2:  # processes take longer to start than one chunk takes
        yield from map(function, chain(begun, remaining))
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_follow_parent)
    waiting: deque[Future[R]] = deque()
    try:
        for item in chain(begun, remaining):
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave Ctrl-C to the process that feeds this one, and end when that one was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
