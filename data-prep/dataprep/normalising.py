"""What is done to every sentence, and when two sentences count as the same."""

import re
import unicodedata
from collections.abc import Callable

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

PLACEHOLDER = re.compile(
    r"""%\(\w+\)[#0\- +]?[\d.]*[a-zA-Z]     # %(name)s
      | %[#0\-+]?[\d.]*[sdif](?!\w)         # %s, %d, %.2f
      | \$?\{[^{}]*\}                       # {name}, ${name}, {}
    """,
    re.VERBOSE,
)
_NUMBER = re.compile(r"\d+")
_NOT_WORD = re.compile(r"[\W_]+")


def single_spaces(text: str) -> str:
    """The text with single plain spaces as its white space, and none at the ends."""
    return " ".join(text.split())


def plain_typography(text: str) -> str:
    """One line of text in NFC, with plain quotation marks, dashes and single spaces."""
    return single_spaces(unicodedata.normalize("NFC", text).translate(_TYPOGRAPHY))


# By the name in `corpora`.
NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "single spaces": single_spaces,
    "plain typography": plain_typography,
}


def match_key(text: str) -> str:
    """What is left of a sentence when case and punctuation do not count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _NOT_WORD.sub(" ", folded).strip()


def mask_key(text: str) -> str:
    """`match_key` with numbers and placeholders made alike: "Button 1" and "Button 2" agree."""
    return _NUMBER.sub("0", match_key(PLACEHOLDER.sub(" 0 ", text)))


# How two sentences may be called the same, from the narrowest to the widest sense.
MATCHES: dict[str, Callable[[str], str]] = {
    "exact": str,
    "casefold, no punctuation": match_key,
    "also numbers and placeholders masked": mask_key,
}
