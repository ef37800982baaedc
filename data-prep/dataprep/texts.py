"""Reads aligned pairs out of text files whose lines, or marked segments, correspond."""

import gzip
import io
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

from dataprep import DataPrepError, Pair


def unpack(archive: Path, wanted: Mapping[str, Path]) -> None:
    """Write some members of a tar archive to files; no name in the archive becomes a path.

    Args:
        archive: a tar file, compressed or not. It is read as far as the last wanted member.
        wanted: for the name of each member, without a leading "./", the file to write, in a folder
            that exists.

    Raises:
        DataPrepError: the archive lacks a wanted file.
    """
    missing = dict(wanted)
    with tarfile.open(archive, "r|*") as tar:
        while missing and (member := tar.next()):
            name = member.name.removeprefix("./")
            if name in missing and member.isreg() and (content := tar.extractfile(member)):
                with missing.pop(name).open("wb") as file:
                    shutil.copyfileobj(content, file)
    if missing:
        raise DataPrepError(f"{archive} does not hold {', '.join(missing)}.")


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
        if found := re.search(r"<seg id=[^>]*>(.*)</seg>", text):
            yield found[1].strip()


FORMS: dict[str, Callable[[Iterable[str]], Iterator[str]]] = {
    "lines": iter,
    "tagged": tagged,
    "segments": segments,
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
        DataPrepError: a line is not UTF-8, or the two have different numbers of sentences.
    """
    for pair in zip_longest(*map(partial(_sentences, source), source.names, paths)):
        if None in pair:
            raise DataPrepError(
                f"{source.names[0]} and {source.names[1]} do not correspond: one has more "
                "sentences than the other."
            )
        yield Pair(*pair)


def _sentences(source: TextSource, name: str, path: Path) -> Iterator[str]:
    replacements = str.maketrans(dict(source.replacements))
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        for sentence in FORMS[source.form](_read_lines(stream, name)):
            yield sentence.translate(replacements)


def read_text(path: Path) -> Iterator[str]:
    """The lines of a file that this program wrote."""
    with path.open("rb") as stream:
        yield from _read_lines(stream, str(path))


def _read_lines(stream: io.BufferedIOBase, name: str) -> Iterator[str]:
    """The lines of a UTF-8 text without their ends, which may be those of Windows.

    They end at line feeds alone: Unicode has other characters that end lines in some programs, and
    they may stand within a sentence.
    """
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataPrepError(f"{name} is not UTF-8 in line {number:,}: {error}.") from error
