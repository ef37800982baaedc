"""Filters by which pairs are removed before training; each has a name, under which it counts.

A filter is data: its limits are its fields, a corpus lists those it uses, and a pair counts for the
first one that removes it.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

from dataprep import Pair
from dataprep.moses import Moses, tokenise
from dataprep.normalising import PLACEHOLDER, match_key

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


@dataclass(frozen=True)
class Filter:
    """Decides about one pair."""

    @property
    def name(self) -> str:
        """What its pairs are counted under: "too-short" of TooShort."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(self).__name__).lower()

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        """Whether the pair is unusable."""
        raise NotImplementedError


@dataclass(frozen=True)
class Empty(Filter):
    """A side without text."""

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return not pair.first or not pair.second


@dataclass(frozen=True)
class NoWords(Filter):
    """A side without a letter, placeholders disregarded."""

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return any(not any(map(str.isalpha, PLACEHOLDER.sub("", text))) for text in pair)


@dataclass(frozen=True)
class Identical(Filter):
    """Sides that agree except in case and punctuation: names, text that was not translated."""

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return match_key(pair.first) == match_key(pair.second)


@dataclass(frozen=True)
class Markup(Filter):
    """HTML, Markdown links and emphasis, code, addresses, templates, escapes."""

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return any(map(_MARKUP.search, pair))


@dataclass(frozen=True)
class Placeholders(Filter):
    """Sides whose `{name}`, `%(name)s`, `${name}` differ, in kind or number."""

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        first, second = (Counter(PLACEHOLDER.findall(text)) for text in pair)
        return first != second


@dataclass(frozen=True)
class TooShort(Filter):
    """Fewer words than this on the longer side; German compounds make one word of several.

    Words are separated by spaces.
    """

    words: int

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return max(len(text.split()) for text in pair) < self.words


@dataclass(frozen=True)
class TooLong(Filter):
    """More words or characters than this on either side."""

    words: int
    characters: int = 1_000_000

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        return any(len(text) > self.characters or len(text.split()) > self.words for text in pair)


@dataclass(frozen=True)
class LengthRatio(Filter):
    """More than `ratio` characters on one side for one on the other, plus `slack`.

    Scripts that say more in a character count for more, see `_DENSITY`.
    """

    ratio: float
    slack: int

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        short, long = sorted(
            len(text) * _DENSITY.get(language[:2], 1)
            for text, language in zip(pair, languages, strict=True)
        )
        return long > self.ratio * short + self.slack


# How many characters of an alphabet stand for one of these languages' scripts, roughly.
_DENSITY = {"zh": 3, "ja": 2, "ko": 2}


@dataclass(frozen=True)
class WordRatio(Filter):
    """More than `ratio` words on one side for one on the other."""

    ratio: float

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        short, long = sorted(len(text.split()) for text in pair)
        return long > self.ratio * short


@dataclass(frozen=True)
class WrongScript(Filter):
    """A side most of whose letters are of another script than its language is written in."""

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
class TokenLengths(Filter):
    """A side without a token, with more than `most`, or with `ratio` times those of the other.

    Tokens are those of the Moses tokeniser, as for clean-corpus-n.perl of the Moses scripts.
    """

    most: int
    ratio: float
    moses: Moses = field(default_factory=Moses)

    def removes(self, pair: Pair, languages: tuple[str, str]) -> bool:
        short, long = sorted(
            len(tokenise([text], language, self.moses)[0].split())
            for text, language in zip(pair, languages, strict=True)
        )
        return short < 1 or long > self.most or long > self.ratio * short
