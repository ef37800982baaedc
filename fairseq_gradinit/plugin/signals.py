"""SIGTERM and Ctrl-C as a wish to stop at the next good moment, not as an interruption."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopSignals:
    """While this context is open, the first SIGTERM or SIGINT is only remembered.

    A second one acts as it would have without this context.

    Attributes:
        received: number of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
