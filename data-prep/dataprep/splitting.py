"""Divides what is read into training, validation and test; counts what is in several of them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dataprep import DataPrepError, Pair
from dataprep.normalising import MATCHES, mask_key

Labelled = tuple[str, Pair]
"""A pair, after the name of the part or of the domain that it belongs to."""


# A split says which of the pairs that were published for training are trained on: `divide` takes
# all of them, each with the name of its domain, and yields each with the name of its part.


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


Split = AsPublished | EveryNth | HeldOut


def _rank(pair: Pair, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\t{pair.first}\t{pair.second}".encode()).digest()


def overlap(
    held_out: Mapping[str, Sequence[Pair]], others: Iterable[Pair], languages: tuple[str, str]
) -> dict[str, dict[str, dict[str, int]]]:
    """Count the held-out sentences that are among other pairs, language by language.

    The others are gone through once. Memory grows with the held-out pairs alone.

    Returns:
        For each part and each sense in `MATCHES`, how many of its pairs have their sentence in each
        of the two languages among the others', and how many the whole pair.
    """
    names = (*languages, "pair")
    keys = {
        sense: {part: [_keys(pair, sense) for pair in pairs] for part, pairs in held_out.items()}
        for sense in MATCHES
    }
    # What is looked for, and what of it is found: a set each for both sides and for whole pairs.
    wanted = {
        sense: [{row[i] for rows in parts.values() for row in rows} for i in range(len(names))]
        for sense, parts in keys.items()
    }
    found: dict[str, list[set[object]]] = {sense: [set() for _ in names] for sense in MATCHES}
    for pair in others:
        for sense in MATCHES:
            for key, known, seen in zip(
                _keys(pair, sense), wanted[sense], found[sense], strict=True
            ):
                if key in known:
                    seen.add(key)
    return {
        part: {
            sense: {
                name: sum(row[i] in found[sense][i] for row in keys[sense][part])
                for i, name in enumerate(names)
            }
            for sense in MATCHES
        }
        for part in held_out
    }


def _keys(pair: Pair, sense: str) -> tuple[object, ...]:
    """What both sides and the whole pair are compared by."""
    first, second = map(MATCHES[sense], pair)
    return first, second, (first, second)
