"""Small JSON files: written whole or not at all, and read with distrust."""

from __future__ import annotations

import contextlib
import json
import math
import os
import reprlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from fairseq_gradinit.errors import GradInitError

T = TypeVar("T")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace what is in `path` by `content`, through a temporary file beside it.

    Raises:
        GradInitError: a file cannot be written there.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise GradInitError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written"
        ) from error
    finally:
        if temporary is not None:
            # It is not there any more if all went well, and may be stuck if the disk does not.
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def parse_json(text: str) -> Any:
    """The value of a JSON text in which no object says the same thing twice.

    Raises:
        ValueError: it is not JSON, or a key is repeated.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {abbreviate(key)} is repeated")
    return found


def abbreviate(value: Any) -> str:
    """`value` in a few printable characters, however large or deep it is."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 60, 60, 40


def require_type(value: Any, kind: type[T]) -> T:
    """`value`, which must be of type `kind`.

    Raises:
        TypeError: it is not; True and False are not numbers here.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{abbreviate(value)} is not of type {kind.__name__}")
    return value


def require_printable(value: Any) -> str:
    """`value`, which must be text that can be shown in a log.

    Raises:
        TypeError: it is not text.
        ValueError: it has line breaks, control characters or halves of characters.
    """
    if not require_type(value, str).isprintable():
        raise ValueError(f"{abbreviate(value)} has characters that cannot be printed")
    return str(value)


def require_finite(value: Any) -> float:
    """`value` as a float, which must be a finite number.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{abbreviate(value)} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return float(value)
