"""Numbers in words: in German, "eintausendzweihundert"; in American English, without "and"."""

import hashlib
from collections.abc import Callable
from itertools import pairwise

NUMBERS = 1_000_000
"""Words are made for the numbers from 0 up to this, this one not included."""


def _words(text: str) -> list[str]:
    return text.split()


_GERMAN = _words(
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
    "fünfzehn sechzehn siebzehn achtzehn neunzehn"
)
_GERMAN_TENS = _words("zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")
_ENGLISH = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_ENGLISH_TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")


def german(number: int) -> str:
    """A number in German, in lower case; hundreds and thousands always say how many.

    Raises:
        ValueError: it is not from 0 to 999,999.
    """
    return _german(_in_range(number), last="eins")


def _german(number: int, last: str) -> str:
    """The word, which ends in `last` if it ends in a one: "eins", or "ein" before another word."""
    if number >= 1000:
        rest = _german(number % 1000, last) if number % 1000 else ""
        return f"{_german(number // 1000, last='ein')}tausend{rest}"
    if number >= 100:
        rest = _german(number % 100, last) if number % 100 else ""
        return f"{_german(number // 100, last='ein')}hundert{rest}"
    if number >= 20:
        unit = f"{_german(number % 10, last='ein')}und" if number % 10 else ""
        return unit + _GERMAN_TENS[number // 10 - 2]
    return last if number == 1 else _GERMAN[number]


def english(number: int) -> str:
    """A number in American English: "one hundred twenty-three", where a Briton says "and".

    Raises:
        ValueError: it is not from 0 to 999,999.
    """
    return _english(_in_range(number))


def _english(number: int) -> str:
    if number >= 1000:
        rest = f" {_english(number % 1000)}" if number % 1000 else ""
        return f"{_english(number // 1000)} thousand{rest}"
    if number >= 100:
        rest = f" {_english(number % 100)}" if number % 100 else ""
        return f"{_english(number // 100)} hundred{rest}"
    if number >= 20:
        unit = f"-{_ENGLISH[number % 10]}" if number % 10 else ""
        return _ENGLISH_TENS[number // 10 - 2] + unit
    return _ENGLISH[number]


def _in_range(number: int) -> int:
    if not 0 <= number < NUMBERS:
        raise ValueError(f"{number} is not from 0 to {NUMBERS - 1}")
    return number


SPELL: dict[str, Callable[[int], str]] = {"de": german, "en": english}
"""By the code of the language."""

# For each number of digits, how many numbers are for training, validation and testing. All of those
# with one digit are trained on: each is a word that others are made of.
_SHARES = {1: (10, 0, 0), 2: (70, 10, 10)} | dict.fromkeys(range(3, 7), (480, 10, 10))


def choose() -> dict[str, list[int]]:
    """Which numbers a corpus of them has: 2,000 for training, 50 for validation, 50 for testing.

    Returns:
        The numbers of train, valid and test, the same in every run, in an order without a pattern.
        None is in two parts, and every part has as many with six digits as with three.
    """
    parts: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for digits, shares in _SHARES.items():
        numbers = _spread(digits, sum(shares))
        for chosen, share in zip(parts.values(), shares, strict=True):
            chosen.extend(numbers.pop() for _ in range(share))
    return {part: sorted(numbers, key=_lot) for part, numbers in parts.items()}


def _spread(digits: int, count: int) -> list[int]:
    """Different numbers of that many digits, one out of each of `count` equal stretches."""
    low, high = (10 ** (digits - 1) if digits > 1 else 0), 10**digits
    edges = [low + (high - low) * i // count for i in range(count + 1)]
    numbers = [start + _lot(start) % (end - start) for start, end in pairwise(edges)]
    return sorted(numbers, key=_lot)


def _lot(number: int) -> int:
    """What a number draws, on every platform."""
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8])
