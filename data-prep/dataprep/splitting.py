"""Splits pairs into training, validation and test so that nothing held out was trained on.

Message catalogues repeat themselves: one English label has several German ones, and "Button 1" is
followed by "Button 2". A pair can therefore be held out only if each of its sides, with case,
punctuation, numbers and placeholders disregarded, occurs in no other pair on either side.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataprep import DataPrepError
from dataprep.cleaning import mask_key, match_key
from dataprep.readers import Pair


@dataclass(frozen=True)
class Splits:
    """The three parts of a corpus; together they are all of its pairs."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]

    def parts(self) -> dict[str, list[Pair]]:
        """The parts by the names that fairseq gives them."""
        return {"train": self.train, "valid": self.valid, "test": self.test}


def split_pairs(pairs: Sequence[Pair], valid_pairs: int, test_pairs: int, seed: int) -> Splits:
    """Hold pairs out for validation and test; the rest is for training.

    Which pairs are held out depends on the seed and on each pair's text, not on the order of the
    pairs, on the platform or on Python's random numbers.

    Args:
        pairs: cleaned pairs.
        valid_pairs: how many to hold out for validation.
        test_pairs: how many to hold out for testing.
        seed: another seed gives another choice.

    Raises:
        DataPrepError: fewer pairs can be held out than asked for, or none is left to train on.
    """
    uses: Counter[str] = Counter()
    for pair in pairs:
        uses.update({mask_key(pair.first), mask_key(pair.second)})
    unique = [p for p in pairs if uses[mask_key(p.first)] == uses[mask_key(p.second)] == 1]
    wanted = valid_pairs + test_pairs
    if len(unique) < wanted or len(pairs) <= wanted:
        raise DataPrepError(
            f"The corpus has {len(pairs):,} clean pairs, of which {len(unique):,} can be held "
            f"out; {wanted:,} are needed for validation and test, and some must be left to train "
            "on."
        )
    held_out = sorted(unique, key=lambda pair: _rank(pair, seed))[:wanted]
    test, valid = held_out[:test_pairs], held_out[test_pairs:]
    chosen = set(held_out)
    return Splits([pair for pair in pairs if pair not in chosen], valid, test)


def _rank(pair: Pair, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\t{pair.first}\t{pair.second}".encode()).digest()


# How two sentences may be called the same, from the narrowest to the widest sense.
MATCHES: dict[str, Callable[[str], str]] = {
    "exact": str,
    "casefold, no punctuation": match_key,
    "also numbers and placeholders masked": mask_key,
}


def leakage(splits: Splits) -> dict[str, int]:
    """Count held-out sentences that also occur elsewhere, on either side, in each sense.

    Returns:
        By the name of each sense in `MATCHES`, the number of held-out pairs with a side that is
        in training or in the other held-out part.
    """
    return {name: _leaks(splits, key) for name, key in MATCHES.items()}


def overlap(splits: Splits, languages: tuple[str, str]) -> dict[str, dict[str, dict[str, int]]]:
    """Count the held-out sentences that were trained on, language by language, in each sense.

    Returns:
        For each held-out part and each sense in `MATCHES`, how many of its pairs have, in training,
        their sentence in each of the two languages, and how many the whole pair.
    """
    counts: dict[str, dict[str, dict[str, int]]] = {"valid": {}, "test": {}}
    for sense, key in MATCHES.items():
        keys = {
            part: [(key(pair.first), key(pair.second)) for pair in pairs]
            for part, pairs in splits.parts().items()
        }
        trained = set(keys["train"])
        first, second = (set(side) for side in zip(*trained, strict=True))
        for part, found in counts.items():
            found[sense] = {
                languages[0]: sum(pair[0] in first for pair in keys[part]),
                languages[1]: sum(pair[1] in second for pair in keys[part]),
                "pair": sum(pair in trained for pair in keys[part]),
            }
    return counts


def _leaks(splits: Splits, key: Callable[[str], str]) -> int:
    sides = {
        name: [{key(pair.first), key(pair.second)} for pair in pairs]
        for name, pairs in splits.parts().items()
    }
    leaks = 0
    for held_out, other in (("test", "valid"), ("valid", "test")):
        elsewhere = set().union(*sides["train"], *sides[other])
        leaks += sum(not side.isdisjoint(elsewhere) for side in sides[held_out])
    return leaks
