"""Tokenises and detokenises as the scripts of the Moses toolkit do, without Perl.

sacremoses does the work. Where it differs from the scripts on German or English text that occurs
in practice, `_Tokenizer` and `_normalise_punctuation` put it right; docs/tokenisation.md says how
often the outcomes agree.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

_LAST_FULL_STOP = re.compile(r"(?<=\S)\.$")

# Python takes these control characters for white space, Perl does not: tokenizer.perl deletes them.
_NO_SPACE_TO_PERL = dict.fromkeys(range(0x1C, 0x20))


@dataclass(frozen=True)
class Moses:
    """How the Moses scripts are to treat a text.

    Attributes:
        lowercase: lowercase the tokens (lowercase.perl).
        aggressive_hyphens: make "part-time" into "part @-@ time" (tokenizer.perl -a).
        normalise_punctuation: apply normalize-punctuation.perl and remove-non-printing-char.perl
            before tokenisation.
    """

    lowercase: bool = False
    aggressive_hyphens: bool = False
    normalise_punctuation: bool = False


def tokenise(lines: Iterable[str], language: str, moses: Moses) -> list[str]:
    """Separate tokens by single spaces and escape what has a meaning to Moses ("&quot;").

    Every line gives one line. The language, by its two-letter code, decides on abbreviations and
    apostrophes.
    """
    tokenizer = _tokenizer(language)
    tokenised = []
    for line in lines:
        text = line
        if moses.normalise_punctuation:
            text = _blank_unprintable(_normalise_punctuation(text, language))
        tokens = tokenizer.tokenize(
            text.translate(_NO_SPACE_TO_PERL),
            aggressive_dash_splits=moses.aggressive_hyphens,
        )
        # Abbreviations are recognised by their case too, so lowercasing comes last.
        joined = " ".join(tokens)
        tokenised.append(_lowercase(joined) if moses.lowercase else joined)
    return tokenised


def detokenise(lines: Iterable[str], language: str) -> list[str]:
    """Join tokens to text again, as detokenizer.perl does; "@-@" and escapes are undone."""
    detokenizer = MosesDetokenizer(language)
    return [detokenizer.detokenize(line.split()) for line in lines]


class _Tokenizer(MosesTokenizer):
    """sacremoses's tokeniser, except for a word with a full stop at the end of a line."""

    def handles_nonbreaking_prefixes(self, text: str) -> str:
        """Split full stops from words, unless they belong to an abbreviation.

        tokenizer.perl always splits the one at the end; sacremoses keeps "etc." whole there too.
        """
        return _LAST_FULL_STOP.sub(" .", super().handles_nonbreaking_prefixes(text))


# Making one takes much longer than tokenising a line.
@cache
def _tokenizer(language: str) -> _Tokenizer:
    return _Tokenizer(language)


@cache
def _normalizer(language: str) -> MosesPunctNormalizer:
    return MosesPunctNormalizer(language, perl_parity=True)


def _normalise_punctuation(text: str, language: str) -> str:
    # The script's rules see the end of the line, and one of them moves a full stop across a
    # quotation mark before it.
    return str(_normalizer(language).normalize(f"{text}\n"))


def _blank_unprintable(text: str) -> str:
    """A space for every control, format, private or unassigned character, as \\p{C} in Perl."""
    if text.isprintable():
        return text
    return "".join(" " if unicodedata.category(char).startswith("C") else char for char in text)


def _lowercase(text: str) -> str:
    # One by one, because Python looks at the neighbours of a capital sigma and Perl does not.
    return "".join(map(str.lower, text))
