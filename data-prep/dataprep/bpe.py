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

SEPARATOR = "@@"

# subword-nmt would remember the pieces of every word that it ever met. So many take about 75 MB.
_REMEMBERED_WORDS = 200_000


def learn_codes(lines: Iterable[str], merges: int, path: Path) -> None:
    """Learn merges and write them as subword-nmt does.

    The same words give the same bytes in every run, in whichever order the lines come. Memory
    grows with the number of different words, not with that of the lines.

    Args:
        lines: tokenised training text of both languages.
        merges: how many to learn.
        path: the file to write.

    Raises:
        DataPrepError: the text has fewer merges to learn.
    """
    words = Counter(word for line in lines for word in line.split())
    if all(len(word) == 1 for word in words):  # subword-nmt fails where there is nothing to merge
        raise _too_small(merges, 0)
    counts = (f"{word} {count}" for word, count in words.items())
    # Lines end in "\n" on every system, and nothing else counts as their end.
    with path.open("w", encoding="utf-8", newline="\n") as codes, _quiet():
        learn_bpe(counts, codes, merges, is_dict=True)
    with path.open(encoding="utf-8", newline="\n") as codes:
        learnt = sum(1 for _ in codes) - 1  # the first line is a version
    if learnt < merges:
        raise _too_small(merges, learnt)


def _too_small(merges: int, learnt: int) -> DataPrepError:
    return DataPrepError(
        f"Only {learnt:,} merges can be learnt from this text, not {merges:,}: ask for fewer, or "
        "take more text."
    )


class Bpe:
    """Cuts words into pieces by learnt codes, in bounded memory."""

    def __init__(self, codes: Path) -> None:
        """Read codes.

        Args:
            codes: the file written by `learn_codes`, or by subword-nmt.

        Raises:
            DataPrepError: it is not such a file.
        """
        try:
            with codes.open(encoding="utf-8", newline="\n") as file, _quiet():
                self._bpe = BPE(file, separator=SEPARATOR)
        except (SystemExit, ValueError) as error:  # subword-nmt exits where a line is no pair
            raise DataPrepError(
                f"{codes} does not hold BPE codes, two pieces a line. Delete it, and it will be "
                "learnt again."
            ) from error

    def encode(self, line: str) -> str:
        """The pieces of a line's words, separated by spaces."""
        if len(self._bpe.cache) > _REMEMBERED_WORDS:
            self._bpe.cache.clear()
        return str(self._bpe.segment(_single_spaces(line)))


def encode_lines(codes: Path, lines: Iterable[str]) -> list[str]:
    """Cut lines into pieces; one line for each.

    Args:
        codes: as for `Bpe`.
        lines: tokenised text, one sentence each.

    Raises:
        DataPrepError: `codes` is not a file of codes.
    """
    bpe = Bpe(codes)
    return [bpe.encode(line) for line in lines]


def _single_spaces(line: str) -> str:
    return " ".join(line.split())


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Keeps from the terminal what subword-nmt writes there: a bar, and errors that are ours."""
    return contextlib.redirect_stderr(io.StringIO())
