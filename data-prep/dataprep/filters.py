"""Filters by which pairs are removed before training; each has a name, under which it counts.

A filter is data: its limits are its fields, a corpus lists those it uses, and a pair counts for the
first one that removes it.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Protocol

from dataprep.moses import Moses, tokenise
from dataprep.normalising import PLACEHOLDER, match_key
from dataprep.pairs import Pair

_MARKUP = re.compile(
    r"""<[^<>]*>              # HTML tag
      | &\#?\w+;              # HTML entity
      | \w+://                # address
      | \]\(                  # Markdown link
      | \*\* | `              # Markdown emphasis, code
      | \{\{ | \{% | \{[^{}]*\{   # templates, plural forms
      | \\                    # escapes
    """,
    re.VERBOSE,
)


class Filter(Protocol):
    """Decides about one pair.

    Attributes:
        name: what its pairs are counted under.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        """Whether the pair is unusable."""


@dataclass(frozen=True)
class Empty:
    """A side without text."""

    name: ClassVar[str] = "empty"

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return not pair.first or not pair.second


@dataclass(frozen=True)
class NoWords:
    """A side without a letter, placeholders disregarded."""

    name: ClassVar[str] = "no-words"

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return any(not any(map(str.isalpha, PLACEHOLDER.sub("", text))) for text in pair)


@dataclass(frozen=True)
class Identical:
    """Sides that agree except in case and punctuation: names, text that was not translated."""

    name: ClassVar[str] = "identical"

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return match_key(pair.first) == match_key(pair.second)


@dataclass(frozen=True)
class Markup:
    """HTML, Markdown links and emphasis, code, addresses, templates, escapes."""

    name: ClassVar[str] = "markup"

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return any(map(_MARKUP.search, pair))


@dataclass(frozen=True)
class Placeholders:
    """Sides whose `{name}`, `%(name)s`, `${name}` differ, in kind or number."""

    name: ClassVar[str] = "placeholders"

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        first, second = (Counter(PLACEHOLDER.findall(text)) for text in pair)
        return first != second


@dataclass(frozen=True)
class TooShort:
    """Fewer words than this on the longer side; German compounds make one word of several.

    Words are separated by spaces.
    """

    words: int
    name: ClassVar[str] = "too-short"

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return max(len(text.split()) for text in pair) < self.words


@dataclass(frozen=True)
class TooLong:
    """More words or characters than this on either side."""

    words: int
    characters: int = 1_000_000
    name: ClassVar[str] = "too-long"

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return any(len(text) > self.characters or len(text.split()) > self.words for text in pair)


@dataclass(frozen=True)
class LengthRatio:
    """More than `ratio` characters on one side for one on the other, plus `slack`.

    Scripts that say more in a character count for more, see `_DENSITY`.
    """

    ratio: float
    slack: int
    name: ClassVar[str] = "length-ratio"

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        short, long = sorted(
            len(text) * _DENSITY.get(language[:2], 1)
            for text, language in zip(pair, languages, strict=True)
        )
        return long > self.ratio * short + self.slack


# How many characters of an alphabet stand for one of these languages' scripts, roughly.
_DENSITY = {"zh": 3, "ja": 2, "ko": 2}


@dataclass(frozen=True)
class WordRatio:
    """More than `ratio` words on one side for one on the other."""

    ratio: float
    name: ClassVar[str] = "word-ratio"

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        short, long = sorted(len(text.split()) for text in pair)
        return long > self.ratio * short


@dataclass(frozen=True)
class WrongScript:
    """A side most of whose letters are of another script than its language is written in."""

    name: ClassVar[str] = "wrong-script"

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return any(
            2 * _letters_of(scripts(language), text) < sum(map(str.isalpha, text))
            for text, language in zip(pair, languages, strict=True)
        )


def _letters_of(expected: frozenset[str], text: str) -> int:
    return sum(character.isalpha() and _script(character) in expected for character in text)


@cache
def _script(character: str) -> str:
    """The first word of a letter's name in Unicode: LATIN, CYRILLIC, CJK."""
    return unicodedata.name(character, "UNKNOWN").split()[0]


_SCRIPTS = {
    **dict.fromkeys(("be", "bg", "kk", "mk", "mn", "ru", "sr", "tg", "uk"), "CYRILLIC"),
    **dict.fromkeys(("ar", "fa", "ug", "ur"), "ARABIC"),
    **dict.fromkeys(("hi", "mr", "ne", "sa"), "DEVANAGARI"),
    **{"am": "ETHIOPIC", "bn": "BENGALI", "bo": "TIBETAN", "dz": "TIBETAN", "el": "GREEK"},
    **{"gu": "GUJARATI", "he": "HEBREW", "hy": "ARMENIAN", "ka": "GEORGIAN", "km": "KHMER"},
    **{"kn": "KANNADA", "ko": "HANGUL CJK", "lo": "LAO", "ml": "MALAYALAM", "or": "ORIYA"},
    **{"pa": "GURMUKHI", "si": "SINHALA", "ta": "TAMIL", "te": "TELUGU", "th": "THAI"},
    **{"ja": "HIRAGANA KATAKANA CJK KATAKANA-HIRAGANA", "zh": "CJK"},
}


def scripts(language: str) -> frozenset[str]:
    """The scripts, as Unicode names them, that a language is written in; most are in LATIN."""
    return frozenset(_SCRIPTS.get(language.partition("-")[0].lower(), "LATIN").split())


@dataclass(frozen=True)
class TokenLengths:
    """A side without a token, with more than `most`, or with `ratio` times those of the other.

    Tokens are those of the Moses tokeniser, as for clean-corpus-n.perl of the Moses scripts.
    """

    most: int
    ratio: float
    moses: Moses = field(default_factory=Moses)
    name: ClassVar[str] = "token-lengths"

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        short, long = sorted(
            len(tokenise([text], language, self.moses)[0].split())
            for text, language in zip(pair, languages, strict=True)
        )
        return short < 1 or long > self.most or long > self.ratio * short
