"""Learns byte-pair encoding and applies it with subword-nmt, as fairseq's recipes do.

What they call codes is the list of merges, the most frequent first, that make pieces of characters.
A piece that does not end its word ends in "@@". White space of any kind separates words and comes
out as single spaces: subword-nmt would take all but the plain space for part of a word.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

from dataprep import DataPrepError


def learn_codes(lines: Iterable[str], merges: int, path: Path) -> None:
    """Learn merges from tokenised text of both languages, and write them as subword-nmt does.

    The same words give the same bytes in every run, in whichever order the lines come. Memory
    grows with the number of different words, not with that of the lines.

    Raises:
        DataPrepError: the text has fewer merges to learn.
    """
    words = Counter(word for line in lines for word in line.split())
    counts = (f"{word} {count}" for word, count in words.items())
    # Lines end in "\n" on every system, and nothing else counts as their end. subword-nmt would
    # show a bar, and an error that is ours.
    with (
        path.open("w", encoding="utf-8", newline="\n") as codes,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        learn_bpe(counts, codes, merges, is_dict=True)
    with path.open(encoding="utf-8", newline="\n") as codes:
        learnt = sum(1 for _ in codes) - 1  # the first line is a version
    if learnt < merges:
        raise DataPrepError(
            f"Only {learnt:,} merges can be learnt from this text, not {merges:,}: choose a "
            "smaller --vocab-size."
        )


def encode_lines(codes: Path, lines: Iterable[str]) -> list[str]:
    """Cut tokenised lines into pieces, by the file that `learn_codes` wrote."""
    with codes.open(encoding="utf-8", newline="\n") as file:
        bpe = BPE(file)
    return [bpe.segment(" ".join(line.split())) for line in lines]
