"""The step that makes text/: reads, cleans and divides, and counts everything it leaves out."""

import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, groupby
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from dataprep import DataPrepError
from dataprep.cleaning import clean, normalise
from dataprep.corpora import Corpus
from dataprep.origins import Files, Stretch
from dataprep.pairs import PARTS, Pair
from dataprep.splitting import Labelled, overlap
from dataprep.steps import Report
from dataprep.texts import read_text

log = logging.getLogger(__name__)

UNPACKED = "unpacked"


def make_text(
    folder: Path, corpus: Corpus, languages: tuple[str, str], files: Files, seed: int, workers: int
) -> Report:
    """Write {train,valid,test}.{language} and those of further parts, one sentence a line.

    Args:
        folder: to write to, empty.
        files: what the corpus's origin obtained.
        seed: chooses the pairs that are held out, if the corpus does not say which.

    Returns:
        What was read and removed, what is left, and what of it is in two parts.

    Raises:
        DataPrepError: a file does not hold what it should, or too few pairs are left.
    """
    read: Counter[str] = Counter()
    with_text: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    removed: Counter[str] = Counter()
    kept: Counter[str] = Counter()

    def counted(stretch: Stretch) -> Iterator[Pair]:
        left_out.update(stretch.left_out)
        for pair in stretch.pairs:
            read[stretch.name] += 1
            with_text[stretch.part] += bool(pair.first.strip() and pair.second.strip())
            yield pair

    def cleaned(stretches: Iterable[Stretch]) -> Iterator[Labelled]:
        seen: set[bytes] = set()
        for stretch in stretches:
            pairs = counted(stretch)
            for pair in clean(pairs, corpus.cleaning, languages, removed, workers, seen):
                kept[stretch.name] += 1
                yield stretch.domain, pair

    def labelled() -> Iterator[Labelled]:
        stretches = corpus.origin.read(files, languages, folder / UNPACKED)
        for part, group in groupby(stretches, lambda stretch: stretch.part):
            if part == "train":
                yield from corpus.split.divide(cleaned(group), seed)
            else:
                pairs = chain.from_iterable(map(counted, group))
                normalised = normalise(pairs, corpus.cleaning.normalisation)
                yield from ((part, pair) for pair in normalised)

    progress = tqdm(labelled(), desc="pairs", unit="", unit_scale=True, disable=None)
    parts = _write(folder, progress, languages)
    shutil.rmtree(folder / UNPACKED, ignore_errors=True)
    _require("with text on both sides", corpus.with_text, with_text)
    _require("in the end", corpus.expected, {part: size["pairs"] for part, size in parts.items()})
    return {
        "left_out": dict(left_out),
        "read": dict(read),
        "removed": dict(removed),
        "kept": dict(kept),
        "parts": parts,
        "in_both": _in_both(folder, languages, workers),
    }


def _write(
    folder: Path, pairs: Iterable[Labelled], languages: tuple[str, str]
) -> dict[str, dict[str, int]]:
    """Write all parts at once; returns the pairs and words of each."""
    sizes: dict[str, dict[str, int]] = {}
    out: dict[str, list[TextIO]] = {}
    with ExitStack() as stack:

        def open_part(part: str) -> None:
            sizes[part] = dict.fromkeys(("pairs", *_words(languages)), 0)
            paths = [folder / f"{part}.{code}" for code in languages]
            out[part] = [stack.enter_context(_create(path)) for path in paths]

        for part in PARTS:
            open_part(part)
        for part, pair in pairs:
            if part not in out:
                open_part(part)
            sizes[part]["pairs"] += 1
            for file, text, words in zip(out[part], pair, _words(languages), strict=True):
                file.write(f"{text}\n")
                sizes[part][words] += len(text.split())
    return sizes


def _words(languages: tuple[str, str]) -> tuple[str, ...]:
    return tuple(f"words_{language}" for language in languages)


def _create(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")


def _require(when: str, expected: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Raise if a part has another number of pairs than it should."""
    if any(found[part] != number for part, number in expected.items()):
        relevant = {part: found[part] for part in expected}
        raise DataPrepError(
            f"The corpus has other numbers of pairs {when} than it should: expected "
            f"{counts(expected)}, found {counts(relevant)}. Either the files are not the published "
            "ones, or they are read wrongly."
        )


def _in_both(
    folder: Path, languages: tuple[str, str], workers: int
) -> dict[str, dict[str, dict[str, int]]]:
    """How much of the held-out parts is also in training, and of the test set in validation."""
    valid, test = (list(read_part(folder, part, languages)) for part in ("valid", "test"))
    training = read_part(folder, "train", languages)
    return {
        **overlap({"valid, in train": valid, "test, in train": test}, training, languages, workers),
        **overlap({"test, in valid": test}, valid, languages),
    }


def read_part(folder: Path, part: str, languages: tuple[str, str]) -> Iterator[Pair]:
    """The pairs of a part that `make_text` wrote."""
    first, second = (read_text(folder / f"{part}.{language}") for language in languages)
    return map(Pair, first, second)


def counts(numbers: Mapping[str, int]) -> str:
    """For a sentence."""
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items())
