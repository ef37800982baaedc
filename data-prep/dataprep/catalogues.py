"""Reads aligned pairs out of message catalogues.

A catalogue maps keys to text. Two catalogues of one program share their keys, so that a pair is
what the two languages say for one key.
"""

import fnmatch
import gettext
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dataprep import DataPrepError, Pair
from dataprep.normalising import PLACEHOLDER

# gettext joins a message's context and its text with this character.
_CONTEXT_SEPARATOR = "\x04"


@dataclass(frozen=True)
class JsonCatalogues:
    """Nested JSON objects of messages, one file a language.

    Attributes:
        pattern: the files' names; "{language}" is the language's code, "*" any text within one
            folder's name.
    """

    pattern: str

    def read(self, files: Mapping[str, bytes], languages: tuple[str, str]) -> Iterator[Pair]:
        """Yield the aligned pairs of files with such names; their order depends on them alone."""
        first, second = (_members(files, self.pattern, language) for language in languages)
        for place in sorted(first.keys() & second.keys()):
            other = dict(_leaves(json.loads(files[second[place]])))
            for key, text in _leaves(json.loads(files[first[place]])):
                if key in other:
                    yield Pair(text, other[key])


@dataclass(frozen=True)
class GettextCatalogues:
    """Compiled gettext catalogues (.mo) whose keys are the messages in English.

    Attributes:
        pattern: as in `JsonCatalogues`.
        mnemonics: characters of which one in a label marks the letter that chooses it, as in
            "_Open" or "&Open". They are left out.
        asides: a regular expression for what is in messages and is not shown, such as what tells
            apart two of the same text. It is left out. gettext's own contexts always are.
    """

    pattern: str
    mnemonics: str = ""
    asides: str = ""

    def read(self, files: Mapping[str, bytes], languages: tuple[str, str]) -> Iterator[Pair]:
        """As in `JsonCatalogues`.

        Raises:
            DataPrepError: there are no such files.
        """
        english_first = languages[0] == "en"
        translated = _members(files, self.pattern, languages[1 if english_first else 0])
        if not translated:
            raise DataPrepError(
                f"There are no message catalogues under {self.pattern}: this package is not what "
                "the corpus was made for."
            )
        for place in sorted(translated):
            for pair in _load_mo(files[translated[place]]):
                message, translation = self._shown(*pair)
                yield Pair(message, translation) if english_first else Pair(translation, message)

    def _shown(self, *pair: str) -> tuple[str, str]:
        """What a reader sees of a message and its translation."""
        first, second = (re.sub(self.asides, "", text) if self.asides else text for text in pair)
        return (
            without_mnemonic(first, second, self.mnemonics),
            without_mnemonic(second, first, self.mnemonics),
        )


Reader = JsonCatalogues | GettextCatalogues


def without_mnemonic(text: str, other: str, marks: str) -> str:
    """A label without the mark in it, if it has one, and only one.

    A mark within a word may be part of a name: before a capital letter, as in "AT&T", and where it
    is an underscore and the label in the other language has the same word, such as "max_width".

    Args:
        other: the label in the other language.
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


def matches(name: str, pattern: str, languages: tuple[str, ...]) -> bool:
    """Whether a file's name is that of a catalogue in one of the languages."""
    return name.count("/") == pattern.count("/") and any(
        fnmatch.fnmatchcase(name, pattern.replace("{language}", language)) for language in languages
    )


def _members(files: Mapping[str, bytes], pattern: str, language: str) -> dict[str, str]:
    """Names of the catalogues in one language, by what is the same in every language."""
    folders = pattern.partition("{language}")[0].count("/")
    found = {}
    for name in files:
        if matches(name, pattern, (language,)):
            parts = name.split("/")
            parts[folders] = "{language}"
            found["/".join(parts)] = name
    return found


def _leaves(
    node: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The texts of nested JSON objects with their key paths, in the file's order."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        elif isinstance(value, str):
            yield (*path, key), value


def _load_mo(content: bytes) -> Iterator[tuple[str, str]]:
    """Messages and translations of one .mo file, in the file's order."""
    translations = gettext.GNUTranslations(io.BytesIO(content))
    # The public interface looks up single messages and cannot list them.
    for key, translation in vars(translations)["_catalog"].items():
        if isinstance(key, tuple):
            message, plural_form = key
            if plural_form != 0:  # its English plural is not in the catalogue
                continue
        else:
            message = key
        yield message.rpartition(_CONTEXT_SEPARATOR)[2], translation
