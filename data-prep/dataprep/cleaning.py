"""Normalises text and removes unusable pairs, in a stream, and counts what each filter removed."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from dataprep import Pair
from dataprep.filters import Filter
from dataprep.normalising import NORMALISATIONS, match_key
from dataprep.parallel import chunks, ordered_map


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
    seen: set[bytes],
    workers: int = 1,
) -> Iterator[Pair]:
    """Normalise pairs, apply the filters and drop duplicates, of which the first stays.

    The pairs that are left come in their order, whatever the number of workers. Memory grows only
    with the number of distinct pairs, by some 100 bytes each, and only if duplicates are dropped.

    Args:
        removed: counts, by the names of the filters, are added to it as the stream is read.
        seen: the keys of the pairs before these, to which those of these are added.
    """
    names = [step.name for step in cleaning.filters] + ["duplicate"] * cleaning.drop_duplicates
    removed.update(dict.fromkeys(names, 0))
    screen = partial(_screen, cleaning, languages)
    for kept, counts in ordered_map(screen, chunks(pairs), workers):
        removed.update(counts)
        for pair, key in kept:
            if key in seen:
                removed["duplicate"] += 1
            else:
                if key is not None:
                    seen.add(key)
                yield pair


def _screen(
    cleaning: Cleaning, languages: tuple[str, str], pairs: list[Pair]
) -> tuple[list[tuple[Pair, bytes | None]], Counter[str]]:
    """The pairs of a chunk that passed, with their keys if duplicates matter; counts of others."""
    kept, removed = [], Counter[str]()
    for pair in normalise(pairs, cleaning.normalisation):
        for step in cleaning.filters:
            if step.removes(pair, languages):
                removed[step.name] += 1
                break
        else:
            kept.append((pair, _key(pair) if cleaning.drop_duplicates else None))
    return kept, removed


def _key(pair: Pair) -> bytes:
    text = f"{match_key(pair.first)}\n{match_key(pair.second)}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
