"""What everything here handles: sentences and their translations."""

from typing import NamedTuple


class Pair(NamedTuple):
    """One text in both languages; `first` and `second` follow the corpus's languages."""

    first: str
    second: str


PARTS = ("train", "valid", "test")
"""The parts of a corpus, by the names that fairseq gives them."""
