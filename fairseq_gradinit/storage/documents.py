"""A dataclass as a JSON file that says what it is, and of which version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.storage.files import abbreviate, parse_json, write_atomically
from fairseq_gradinit.storage.typed_json import parse

T = TypeVar("T")


@dataclass(frozen=True)
class Format:
    """A kind of document.

    Attributes:
        name: stands in each of them.
        version: of the format; others are not read.
        contents: what it holds, for messages: "the scales of a run".
    """

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
    """Read back what `save_document` made of an instance of `kind`, see `parse`.

    Raises:
        GradInitError: the file cannot be read, is damaged, or is not of this format and version.
    """
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GradInitError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise GradInitError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, Mapping) or document.get("format") != form.name:
        raise GradInitError(f"{path} does not hold {form.contents} (no format {form.name!r} in it)")
    version = document.get("version")
    if type(version) is not int or version != form.version:
        raise GradInitError(
            f"{path} has version {abbreviate(version)} of its format, and this fairseq-gradinit "
            f"reads version {form.version}: make the file again, or use the release that wrote it"
        )
    body = {name: value for name, value in document.items() if name not in ("format", "version")}
    try:
        return parse(kind, body)
    except ValueError as error:
        raise GradInitError(f"{path} is damaged: {error}") from error
