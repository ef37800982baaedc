"""Normalises text and removes unusable pairs, in a stream, and counts what each filter removed."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from dataprep.filters import Filter
from dataprep.normalising import NORMALISATIONS, match_key
from dataprep.pairs import Pair
from dataprep.parallel import chunks, ordered_map

DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Cleaning:
    """What is done to the text of a corpus.

    Attributes:
        normalisation: what is done to each sentence, one of `normalising.NORMALISATIONS`.
        filters: by which pairs to train on are removed, in this order.
        drop_duplicates: whether a pair is removed that agrees with an earlier one on both sides,
            except in case and punctuation.
    """

    normalisation: str
    filters: tuple[Filter, ...] = ()
    drop_duplicates: bool = False

    def names(self) -> list[str]:
        """What pairs are counted under, in the order of the filters."""
        return [step.name for step in self.filters] + [DUPLICATE] * self.drop_duplicates


class _Screened(NamedTuple):
    """The outcome for a chunk: pairs that passed, their keys if duplicates matter, counts."""

    kept: list[Pair]
    keys: list[bytes]
    removed: Counter[str]


def normalise(pairs: Iterable[Pair], normalisation: str) -> Iterator[Pair]:
    """The pairs with one of `normalising.NORMALISATIONS` done to both sides."""
    change = NORMALISATIONS[normalisation]
    for pair in pairs:
        yield Pair(change(pair.first), change(pair.second))


def clean(
    pairs: Iterable[Pair],
    cleaning: Cleaning,
    languages: tuple[str, str],
    removed: Counter[str],
    workers: int = 1,
    seen: set[bytes] | None = None,
) -> Iterator[Pair]:
    """Normalise pairs, apply the filters and drop duplicates, of which the first stays.

    The pairs that are left come in their order, whatever the number of workers. Memory grows only
    with the number of distinct pairs, by some 100 bytes each, and only if duplicates are dropped.

    Args:
        removed: counts, by the names of `cleaning`, are added to it as the stream is read.
        seen: the keys of the pairs before these, to which those of these are added; None if there
            are none.
    """
    seen = set() if seen is None else seen
    removed.update(dict.fromkeys(cleaning.names(), 0))
    screen = partial(_screen, cleaning, languages)
    for outcome in ordered_map(screen, chunks(pairs), workers):
        removed.update(outcome.removed)
        if not cleaning.drop_duplicates:
            yield from outcome.kept
            continue
        for pair, key in zip(outcome.kept, outcome.keys, strict=True):
            if key in seen:
                removed[DUPLICATE] += 1
            else:
                seen.add(key)
                yield pair


def _screen(cleaning: Cleaning, languages: tuple[str, str], pairs: list[Pair]) -> _Screened:
    outcome = _Screened([], [], Counter())
    for pair in normalise(pairs, cleaning.normalisation):
        for step in cleaning.filters:
            if step.removes(pair, languages):
                outcome.removed[step.name] += 1
                break
        else:
            outcome.kept.append(pair)
            if cleaning.drop_duplicates:
                outcome.keys.append(_key(pair))
    return outcome


def _key(pair: Pair) -> bytes:
    text = f"{match_key(pair.first)}\n{match_key(pair.second)}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
