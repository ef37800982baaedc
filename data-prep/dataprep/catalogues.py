"""Reads aligned pairs out of message catalogues, without unpacking or importing anything.

A catalogue maps keys to text. Two catalogues of one program share their keys, so that a pair is
what the two languages say for one key. Wheels are read as zip archives, member by member; of Debian
packages only the catalogues are.
"""

import fnmatch
import gettext
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dataprep import DataPrepError
from dataprep.normalising import PLACEHOLDER
from dataprep.packages import read_members
from dataprep.pairs import Pair

# gettext joins a message's context and its text with this character.
_CONTEXT_SEPARATOR = "\x04"


class Archive(Protocol):
    """What a reader needs of a zip archive, and `Catalogues` has too."""

    @property
    def filename(self) -> str | None:
        """Its path."""

    def namelist(self) -> list[str]:
        """The names of all files."""

    def read(self, name: str, /) -> bytes:
        """The content of one of them."""


@dataclass(frozen=True)
class Catalogues:
    """Catalogues out of a Debian package, by their names there."""

    filename: str
    files: dict[str, bytes]

    def namelist(self) -> list[str]:
        return list(self.files)

    def read(self, name: str, /) -> bytes:
        return self.files[name]


class Reader(Protocol):
    """Knows where a wheel or a package keeps its catalogues and how to align them."""

    @property
    def pattern(self) -> str:
        """The catalogues' names."""

    def read(self, archive: Archive, languages: tuple[str, str]) -> Iterator[Pair]:
        """Yield the aligned pairs, in an order that depends on the archive's content alone.

        Raises:
            DataPrepError: no catalogue is where it is expected, or one cannot be parsed.
        """


@dataclass(frozen=True)
class JsonCatalogues:
    """Nested JSON objects of messages, one file a language.

    Attributes:
        pattern: the files' names; "{language}" is the language's code, "*" for any text
            within one folder's name.
    """

    pattern: str

    def read(self, archive: Archive, languages: tuple[str, str]) -> Iterator[Pair]:
        first, second = (_members(archive, self.pattern, language) for language in languages)
        for place in _common(first, second, self.pattern, archive, languages):
            other = dict(_leaves(_load_json(archive, second[place])))
            for key, text in _leaves(_load_json(archive, first[place])):
                if key in other:
                    yield Pair(text, other[key])


@dataclass(frozen=True)
class GettextCatalogues:
    """Compiled gettext catalogues (.mo) whose keys are the messages in one of the languages.

    Attributes:
        pattern: the files' names; "{language}" and "*" as in `JsonCatalogues`.
        message_language: the language of the keys (gettext's msgid).
        mnemonics: characters of which one in a label marks the letter that chooses it, as in
            "_Open" or "&Open". They are left out.
        asides: a regular expression for what is in messages and is not shown, such as what tells
            apart two of the same text. It is left out. gettext's own contexts always are.
    """

    pattern: str
    message_language: str
    mnemonics: str = ""
    asides: str = ""

    def read(self, archive: Archive, languages: tuple[str, str]) -> Iterator[Pair]:
        if self.message_language not in languages:
            raise DataPrepError(
                f"{_name(archive)} holds messages in {self.message_language!r}, which is not one "
                f"of the corpus's languages {languages}."
            )
        keys_first = languages[0] == self.message_language
        translated = _members(archive, self.pattern, languages[1 if keys_first else 0])
        if not translated:
            raise _nothing_found(archive, self.pattern, languages)
        for place in sorted(translated):
            for pair in _load_mo(archive, translated[place]):
                message, translation = self._shown(*pair)
                yield Pair(message, translation) if keys_first else Pair(translation, message)

    def _shown(self, *pair: str) -> tuple[str, str]:
        """What a reader sees of a message and its translation."""
        first, second = (re.sub(self.asides, "", text) if self.asides else text for text in pair)
        return (
            without_mnemonic(first, second, self.mnemonics),
            without_mnemonic(second, first, self.mnemonics),
        )


def without_mnemonic(text: str, other: str, marks: str) -> str:
    """A label without the mark in it, if it has one, and only one.

    A mark within a word may be part of a name: before a capital letter, as in "AT&T", and where it
    is an underscore and the label in the other language has the same word, such as "max_width".

    Args:
        text: the label.
        other: the same in the other language.
        marks: the characters that can mark a letter.
    """
    if not marks:
        return text
    outside = PLACEHOLDER.sub(lambda match: " " * len(match[0]), text)
    # HTML's entities, such as "&amp;", have no mark.
    found = list(re.finditer(rf"(\w*?)([{re.escape(marks)}])(?!\w+;)\w+", outside))
    if len(found) != 1:
        return text
    word, before, mark = found[0].group(0, 1, 2)
    after = text[found[0].end(2)]
    if before and (after.isupper() or (mark == "_" and word in re.findall(r"\w+", other))):
        return text
    return text[: found[0].start(2)] + text[found[0].end(2) :]


def read_wheel(path: Path, reader: Reader, languages: tuple[str, str]) -> list[Pair]:
    """Read all aligned pairs of one wheel.

    Args:
        path: the wheel, already verified.
        reader: how to read it.
        languages: the two languages' codes.

    Raises:
        DataPrepError: the file is no zip archive, or `reader` finds no usable catalogue in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return list(reader.read(archive, languages))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataPrepError(f"{path} cannot be read as a zip archive: {error}.") from error


def read_package(path: Path, reader: Reader, languages: tuple[str, str]) -> list[Pair]:
    """Read all aligned pairs of one Debian package.

    Raises:
        DataPrepError: the package cannot be read, or `reader` finds no usable catalogue in it.
    """
    patterns = [reader.pattern.replace("{language}", language) for language in languages]
    members = read_members(path, lambda name: any(_matches(name, p) for p in patterns))
    return list(reader.read(Catalogues(str(path), dict(members)), languages))


def _name(archive: Archive) -> str:
    return Path(archive.filename or "the archive").name


def _members(archive: Archive, pattern: str, language: str) -> dict[str, str]:
    """Names of the catalogues in one language, by what is the same in every language."""
    wanted = pattern.replace("{language}", language)
    before, _, _ = pattern.partition("{language}")
    folders = before.count("/")
    found = {}
    for name in archive.namelist():
        if _matches(name, wanted):
            parts = name.split("/")
            parts[folders] = "{language}"
            found["/".join(parts)] = name
    return found


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _common(
    first: dict[str, str],
    second: dict[str, str],
    pattern: str,
    archive: Archive,
    languages: tuple[str, str],
) -> list[str]:
    places = sorted(first.keys() & second.keys())
    if not places:
        raise _nothing_found(archive, pattern, languages)
    return places


def _nothing_found(archive: Archive, pattern: str, languages: tuple[str, str]) -> DataPrepError:
    return DataPrepError(
        f"{_name(archive)} has no message catalogues for {' and '.join(languages)} under "
        f"{pattern!r}: this is not what the corpus was made for."
    )


def _load_json(archive: Archive, name: str) -> dict[str, Any]:
    try:
        content = json.loads(archive.read(name))
    except (ValueError, RecursionError) as error:  # a wrong encoding is a ValueError too
        raise DataPrepError(f"{name} in {_name(archive)} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DataPrepError(f"{name} in {_name(archive)} is JSON, but not an object of messages.")
    return content


def _leaves(
    node: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The texts of nested JSON objects with their key paths, in the file's order."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        elif isinstance(value, str):
            yield (*path, key), value


def _load_mo(archive: Archive, name: str) -> Iterator[tuple[str, str]]:
    """Messages and translations of one .mo file, in the file's order."""
    try:
        translations = gettext.GNUTranslations(io.BytesIO(archive.read(name)))
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise DataPrepError(
            f"{name} in {_name(archive)} is not a compiled gettext catalogue: {error}."
        ) from error
    # The public interface looks up single messages and cannot list them.
    for key, translation in vars(translations)["_catalog"].items():
        if isinstance(key, tuple):
            message, plural_form = key
            if plural_form != 0:  # its English plural is not in the catalogue
                continue
        else:
            message = key
        yield message.rpartition(_CONTEXT_SEPARATOR)[2], translation
