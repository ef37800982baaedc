"""Files that are written whole, and JSON files that say what they hold and of which version."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.storage.typed_json import abbreviate, parse

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


@dataclass(frozen=True)
class Format:
    """A kind of document, and what it holds, for messages: "the scales of a run"."""

    name: str
    version: int
    contents: str


def save_document(path: Path, form: Format, value: Any) -> None:
    """Write the dataclass `value`; `path` keeps its old content or gets all of the new one.

    Raises:
        GradInitError: the file cannot be written.
    """
    document = {"format": form.name, "version": form.version, **asdict(value)}
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def load_document(path: Path, form: Format, kind: type[T]) -> T:
    """Read back what `save_document` made of an instance of `kind`.

    Raises:
        GradInitError: the file cannot be read, is damaged, or is not of this format and version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GradInitError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise GradInitError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.pop("format", None) != form.name:
        raise GradInitError(f"{path} does not hold {form.contents} (no format {form.name!r} in it)")
    version = document.pop("version", None)
    if type(version) is not int or version != form.version:
        raise GradInitError(
            f"{path} has version {abbreviate(version)} of its format, and this fairseq-gradinit "
            f"reads version {form.version}: make the file again, or use the release that wrote it"
        )
    try:
        return parse(kind, document)
    except ValueError as error:
        raise GradInitError(f"{path} is damaged: {error}") from error
