"""Reads aligned pairs out of text files whose lines, or marked segments, correspond."""

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

from dataprep import DataPrepError
from dataprep.pairs import Pair


def lines(texts: Iterable[str]) -> Iterator[str]:
    """Every line is a sentence."""
    yield from texts


def tagged(texts: Iterable[str]) -> Iterator[str]:
    """WIT3's training files: sentences, and talks described in tags.

    Addresses, numbers and keywords of talks go; titles and descriptions stay, as sentences. This is
    what fairseq's examples/translation/prepare-iwslt14.sh does, and so the published sizes have it.
    """
    for text in texts:
        if not any(tag in text for tag in ("<url>", "<talkid>", "<keywords>")):
            yield re.sub("</?(title|description)>", "", text)


def segments(texts: Iterable[str]) -> Iterator[str]:
    """WMT's and WIT3's evaluation sets: one `<seg id="1"> ... </seg>` a line, other lines apart.

    Entities stay as they are, as in sacrebleu's copies of these sets and in fairseq's scripts.
    """
    for text in texts:
        found = re.search(r"<seg id=[^>]*>(.*)</seg>", text)
        if found:
            yield found[1].strip()
        elif "<seg id" in text:
            raise DataPrepError(f"a segment does not end on its line: {text[:80]!r}")


# By the name in `corpora`.
FORMS: dict[str, Callable[[Iterable[str]], Iterator[str]]] = {
    function.__name__: function for function in (lines, tagged, segments)
}


@dataclass(frozen=True)
class TextSource:
    """Two texts that correspond.

    Attributes:
        part: the part of the corpus that they belong to: train, valid or test.
        names: of the two files, in the order of the corpus's languages; in the archive, if any.
        archive: the name of the file that they are in, or None if they are files themselves.
        form: how the sentences lie in the text, one of `FORMS`.
        replacements: characters that are replaced, each with what by.
    """

    part: str
    names: tuple[str, str]
    archive: str | None = None
    form: str = "lines"
    replacements: tuple[tuple[str, str], ...] = ()


def read_pairs(source: TextSource, paths: tuple[Path, Path]) -> Iterator[Pair]:
    """Yield the pairs of two texts in constant memory; white space at the ends of lines stays.

    Args:
        paths: where the two texts are, compressed by gzip if they are so named.

    Raises:
        DataPrepError: a file cannot be read, or the two have different numbers of sentences.
    """
    first, second = map(partial(_sentences, source), source.names, paths)
    for number, pair in enumerate(zip_longest(first, second)):
        if None in pair:
            counts = [number, number]
            longer = 1 if pair[0] is None else 0
            counts[longer] += 1 + sum(1 for _ in (first, second)[longer])
            raise DataPrepError(
                f"{source.names[0]} and {source.names[1]} do not correspond: {counts[0]:,} "
                f"sentences in the one, {counts[1]:,} in the other."
            )
        yield Pair(*pair)


def _sentences(source: TextSource, name: str, path: Path) -> Iterator[str]:
    replacements = str.maketrans(dict(source.replacements))
    try:
        with _opened(path) as stream:
            for sentence in FORMS[source.form](read_lines(stream)):
                yield sentence.translate(replacements)
    except (OSError, EOFError, zlib.error, DataPrepError) as error:
        what = path if source.archive is None else f"{name} in {source.archive}"
        raise DataPrepError(f"{what} cannot be read as text: {error}.") from error


def _opened(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def read_lines(stream: io.BufferedIOBase) -> Iterator[str]:
    """The lines of a UTF-8 text without their ends, which may be those of Windows.

    They end at line feeds alone: Unicode has other characters that end lines in some programs, and
    they may stand within a sentence.

    Raises:
        DataPrepError: a line is not UTF-8.
    """
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataPrepError(f"line {number:,} is not UTF-8 ({error})") from error


def read_text(path: Path) -> Iterator[str]:
    """The lines of a file that this program wrote."""
    with path.open("rb") as stream:
        yield from read_lines(stream)
