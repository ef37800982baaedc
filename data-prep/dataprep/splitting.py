"""Divides what is read into training, validation and test; counts what is in several of them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from dataprep import DataPrepError
from dataprep.normalising import MATCHES, mask_key
from dataprep.pairs import Pair
from dataprep.parallel import chunks, ordered_map

Labelled = tuple[str, Pair]
"""A pair, after the name of the part or of the domain that it belongs to."""


class Split(Protocol):
    """Says which of the pairs that were published for training are trained on."""

    def divide(self, pairs: Iterable[Labelled], seed: int) -> Iterator[Labelled]:
        """Yield all pairs, each with the name of its part.

        Args:
            pairs: each with the name of its domain.

        Raises:
            DataPrepError: there are too few.
        """


@dataclass(frozen=True)
class AsPublished:
    """All of them are; the other parts were published too."""

    def divide(self, pairs: Iterable[Labelled], seed: int) -> Iterator[Labelled]:
        return (("train", pair) for _, pair in pairs)


@dataclass(frozen=True)
class EveryNth:
    """Every `n`-th one is for validation."""

    n: int

    def divide(self, pairs: Iterable[Labelled], seed: int) -> Iterator[Labelled]:
        for number, (_, pair) in enumerate(pairs, start=1):
            yield ("train" if number % self.n else "valid"), pair


@dataclass(frozen=True)
class HeldOut:
    """Validation and test are chosen so that nothing of them is trained on.

    Messages and manuals repeat themselves: one English label has several German ones, and "Button
    1" is followed by "Button 2". A pair can therefore be held out only if each of its sides, with
    case, punctuation, numbers and placeholders disregarded, occurs in no other pair on either side.
    Which pairs are held out depends on the seed and on each pair's text, not on their order, on the
    platform or on Python's random numbers. All pairs are held in memory.

    Attributes:
        valid: how many pairs of each domain are for validation.
        test: how many for testing. Those of domains with a name also are a part of their own,
            test-NAME.
    """

    valid: int
    test: int

    def divide(self, pairs: Iterable[Labelled], seed: int) -> Iterator[Labelled]:
        everything = list(pairs)
        uses: Counter[str] = Counter()
        for _, pair in everything:
            uses.update({mask_key(pair.first), mask_key(pair.second)})
        chosen = set()
        for domain in dict.fromkeys(name for name, _ in everything) or [""]:
            own = [pair for name, pair in everything if name == domain]
            held_out = self._choose(domain, own, uses, seed)
            chosen.update(held_out)
            for number, pair in enumerate(held_out):
                yield ("test" if number < self.test else "valid"), pair
                if domain and number < self.test:
                    yield f"test-{domain}", pair
        yield from (("train", pair) for _, pair in everything if pair not in chosen)

    def _choose(
        self, domain: str, pairs: Sequence[Pair], uses: Mapping[str, int], seed: int
    ) -> list[Pair]:
        """Those of a domain that are held out, the ones for testing first."""
        unique = [p for p in pairs if uses[mask_key(p.first)] == uses[mask_key(p.second)] == 1]
        wanted = self.valid + self.test
        if len(unique) < wanted or len(pairs) <= wanted:
            raise DataPrepError(
                f"The {f'domain {domain}' if domain else 'corpus'} has {len(pairs):,} clean pairs, "
                f"of which {len(unique):,} can be held out; {wanted:,} are needed for validation "
                "and test, and some must be left to train on."
            )
        return sorted(unique, key=lambda pair: _rank(pair, seed))[:wanted]


def _rank(pair: Pair, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\t{pair.first}\t{pair.second}".encode()).digest()


# ---- What is held out and was trained on.

Digests = tuple[bytes, bytes]


class _Common(NamedTuple):
    """What two sets of pairs have in common: sentences of either side, whole pairs."""

    first: set[bytes]
    second: set[bytes]
    pair: set[Digests]


def overlap(
    held_out: Mapping[str, Sequence[Pair]],
    others: Iterable[Pair],
    languages: tuple[str, str],
    workers: int = 1,
) -> dict[str, dict[str, dict[str, int]]]:
    """Count the held-out sentences that are among other pairs, language by language.

    The others are gone through once. Memory grows with the held-out pairs alone.

    Args:
        held_out: the pairs of each part.

    Returns:
        For each part and each sense in `MATCHES`, how many of its pairs have their sentence in each
        of the two languages among the others', and how many the whole pair.
    """
    parts = {
        part: {sense: [_digests(pair, sense) for pair in pairs] for sense in MATCHES}
        for part, pairs in held_out.items()
    }
    keys = {sense: [pair for part in parts.values() for pair in part[sense]] for sense in MATCHES}
    found = {sense: _Common(set(), set(), set()) for sense in MATCHES}
    for common in ordered_map(partial(_in_common, keys), chunks(others), workers):
        for sense, new in common.items():
            found[sense].first.update(new.first)
            found[sense].second.update(new.second)
            found[sense].pair.update(new.pair)
    return {
        part: {
            sense: {
                languages[0]: sum(pair[0] in found[sense].first for pair in pairs),
                languages[1]: sum(pair[1] in found[sense].second for pair in pairs),
                "pair": sum(pair in found[sense].pair for pair in pairs),
            }
            for sense, pairs in senses.items()
        }
        for part, senses in parts.items()
    }


def _in_common(keys: Mapping[str, list[Digests]], others: list[Pair]) -> dict[str, _Common]:
    common = {}
    for sense, held_out in keys.items():
        pairs = {_digests(pair, sense) for pair in others}
        first, second = (set(side) for side in zip(*pairs, strict=True))
        common[sense] = _Common(
            first.intersection(pair[0] for pair in held_out),
            second.intersection(pair[1] for pair in held_out),
            pairs.intersection(held_out),
        )
    return common


def _digests(pair: Pair, sense: str) -> Digests:
    """Hashes of both sentences: other processes hash strings differently, and these are short."""
    key = MATCHES[sense]
    first, second = (hashlib.blake2b(key(text).encode(), digest_size=8).digest() for text in pair)
    return first, second
