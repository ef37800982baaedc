"""Small JSON files: written whole or not at all, and read with distrust."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from fairseq_gradinit.errors import GradInitError

T = TypeVar("T")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace what is in `path` by `content`, through a temporary file beside it.

    Raises:
        GradInitError: a file cannot be written there.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise GradInitError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written"
        ) from error


def typed(value: Any, kind: type[T]) -> T:
    """`value`, which must be of type `kind`.

    Raises:
        TypeError: it is not; True and False are not numbers here.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def number(value: Any) -> float:
    """`value` as a float, which must be a finite number.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return float(value)
