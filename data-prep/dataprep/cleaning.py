"""Normalises text and removes unusable pairs, each by a filter that has a name and a count."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dataprep.readers import Pair

# NFC, not NFKC, is the Unicode form: the compatibility form would turn "CO₂" into "CO2", "m³" into
# "m3" and "20 º" into "20 o". What differs by the translator's keyboard alone, and not by meaning,
# is mapped by hand, so that the model need not guess which of six quotation marks was used.
_DOUBLE_QUOTES = "\u201c\u201d\u201e\u201f\u00ab\u00bb"
_SINGLE_QUOTES = "\u2018\u2019\u201a\u201b\u2039\u203a\u00b4"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015"
_INVISIBLE = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"  # soft hyphen, zero width
_TYPOGRAPHY = str.maketrans(
    {
        **dict.fromkeys(_DOUBLE_QUOTES, '"'),
        **dict.fromkeys(_SINGLE_QUOTES, "'"),
        **dict.fromkeys(_DASHES, "-"),
        **dict.fromkeys(_INVISIBLE, None),
        "\u2026": "...",
        "\u00ba": "\u00b0",  # the ordinal sign, typed for the degree sign
    }
)

_PLACEHOLDER = re.compile(
    r"""%\(\w+\)[#0\- +]?[\d.]*[a-zA-Z]     # %(name)s
      | %[#0\-+]?[\d.]*[sdif](?!\w)         # %s, %d, %.2f
      | \$?\{[^{}]*\}                       # {name}, ${name}, {}
    """,
    re.VERBOSE,
)
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
_NUMBER = re.compile(r"\d+")
_NOT_WORD = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """One line of text in NFC, with plain quotation marks, dashes and single spaces."""
    text = unicodedata.normalize("NFC", text).translate(_TYPOGRAPHY)
    return single_spaces(text)


def single_spaces(text: str) -> str:
    """The text as it stands, but for white space: single plain spaces, none at the ends."""
    return " ".join(text.split())


# What may be done to a text that is otherwise kept as published, by the name in `corpora`.
NORMALISATIONS: dict[str, Callable[[str], str]] = {"single spaces": single_spaces}


def match_key(text: str) -> str:
    """What is left of a sentence when case and punctuation do not count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _NOT_WORD.sub(" ", folded).strip()


def mask_key(text: str) -> str:
    """`match_key` with numbers and placeholders made alike: "Button 1" and "Button 2" agree."""
    return _NUMBER.sub("0", match_key(_PLACEHOLDER.sub(" 0 ", text)))


@dataclass(frozen=True)
class CleaningRules:
    """The filters' limits, the same for training, validation and test.

    Attributes:
        max_words: most words (split at spaces) on either side.
        min_words: fewest words on the longer side. German compounds make one word of several
            English ones, therefore the longer side.
        max_ratio: most characters on one side for one on the other.
        ratio_slack: characters that the longer side may have beyond `max_ratio`, for short texts.
    """

    max_words: int = 25
    min_words: int = 2
    max_ratio: float = 2.0
    ratio_slack: int = 5


def _words(pair: Pair) -> tuple[int, int]:
    return len(pair.first.split()), len(pair.second.split())


def _has_no_word(text: str) -> bool:
    return not any(character.isalpha() for character in _PLACEHOLDER.sub("", text))


def _length_ratio_off(pair: Pair, rules: CleaningRules) -> bool:
    short, long = sorted((len(pair.first), len(pair.second)))
    return long > rules.max_ratio * short + rules.ratio_slack


def _placeholders_differ(pair: Pair) -> bool:
    first, second = (Counter(_PLACEHOLDER.findall(text)) for text in (pair.first, pair.second))
    return first != second


# A pair is counted under the first filter that removes it, so the order is part of the counts.
FILTERS: dict[str, Callable[[Pair, CleaningRules], bool]] = {
    "empty": lambda pair, rules: not pair.first or not pair.second,
    "no-words": lambda pair, rules: _has_no_word(pair.first) or _has_no_word(pair.second),
    "identical": lambda pair, rules: match_key(pair.first) == match_key(pair.second),
    "markup": lambda pair, rules: bool(_MARKUP.search(pair.first) or _MARKUP.search(pair.second)),
    "placeholders": lambda pair, rules: _placeholders_differ(pair),
    "too-short": lambda pair, rules: max(_words(pair)) < rules.min_words,
    "too-long": lambda pair, rules: max(_words(pair)) > rules.max_words,
    "length-ratio": _length_ratio_off,
}


@dataclass(frozen=True)
class Cleaned:
    """Pairs that every filter let pass, and how many each one removed, in the filters' order.

    Attributes:
        pairs: normalised pairs, no two of which agree in `match_key` on both sides.
        removed: pairs removed, by the filter's name; "duplicate" comes last.
    """

    pairs: list[Pair]
    removed: dict[str, int]


def clean(pairs: Iterable[Pair], rules: CleaningRules) -> Cleaned:
    """Normalise pairs, apply `FILTERS` and drop duplicates.

    Of duplicates the first stays, in the order in which the pairs come.
    """
    removed = dict.fromkeys((*FILTERS, "duplicate"), 0)
    kept: list[Pair] = []
    seen: set[tuple[str, str]] = set()
    for raw in pairs:
        pair = Pair(normalise(raw.first), normalise(raw.second))
        reason = next((name for name, removes in FILTERS.items() if removes(pair, rules)), None)
        if reason is None:
            key = (match_key(pair.first), match_key(pair.second))
            if key not in seen:
                seen.add(key)
                kept.append(pair)
                continue
            reason = "duplicate"
        removed[reason] += 1
    return Cleaned(kept, removed)
