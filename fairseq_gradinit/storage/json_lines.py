"""Files of one JSON value a line, which only grow, and which several processes may write to."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fairseq_gradinit.errors import GradInitError

T = TypeVar("T")

logger = logging.getLogger(__name__)


def read_lines(path: Path, parse: Callable[[Any], T], what: str) -> list[T]:
    """Read every line; a last one that was not written to its end is left out.

    Args:
        parse: raises TypeError or ValueError for a JSON value that is not `what`: "a run", say.

    Raises:
        GradInitError: the file cannot be read, or a line is not `what`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise GradInitError(
            f"cannot read {path}: {error.strerror or error}; name a file of results"
        ) from error
    found = []
    # Behind the last newline stands what a killed writer left, or nothing.
    for i, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            found.append(parse(json.loads(line)))
        except (TypeError, ValueError, RecursionError) as error:
            raise GradInitError(
                f"line {i} of {path} is not {what} ({error}): mend or remove it"
            ) from error
    return found


def append_line(path: Path, value: Any) -> None:
    """Add a line with the JSON of `value`, behind the last that was written to its end.

    Raises:
        GradInitError: the file cannot be written.
        ValueError: `value` holds a float that is not finite.
    """
    line = (json.dumps(value, allow_nan=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            # A line must not get lost for want of locks, which some network file systems lack.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                logger.warning("the last line of %s was not written to its end: removed", path)
                os.truncate(path, end)
            # Unbuffered and in one piece, or torn where the next writer finds it.
            if os.write(file.fileno(), line) < len(line):
                raise OSError("there is no room for the whole line")
    except OSError as error:
        raise GradInitError(
            f"cannot append to {path}: {error.strerror or error}; choose a file that can be written"
        ) from error
