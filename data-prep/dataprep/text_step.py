"""The step that makes text/: reads, cleans and divides, and counts everything it leaves out."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dataprep import DataPrepError, Pair
from dataprep.cleaning import clean, normalise
from dataprep.corpora import Corpus
from dataprep.origins import Files, Stretch
from dataprep.splitting import Labelled, overlap
from dataprep.texts import read_text


def make_text(
    folder: Path,
    corpus: Corpus,
    languages: tuple[str, str],
    files: Sequence[Files],
    seed: int,
    workers: int,
) -> dict[str, Any]:
    """Write {train,valid,test}.{language} and those of further parts, one sentence a line.

    Args:
        files: what each of the corpus's origins obtained.
        seed: chooses the pairs that are held out, if the corpus does not say which.

    Returns:
        What was read and removed, what is left, and what of it is in two parts.

    Raises:
        DataPrepError: a file does not hold what it should, or too few pairs are left.
    """
    read, with_text, left_out, removed, kept = (Counter[str]() for _ in range(5))
    unpacked = folder / "unpacked"

    def counted(stretch: Stretch) -> Iterator[Pair]:
        left_out.update(stretch.left_out)
        for pair in stretch.pairs:
            read[stretch.name] += 1
            with_text[stretch.part] += bool(pair.first.strip() and pair.second.strip())
            yield pair

    def stretches() -> Iterator[tuple[str, Stretch]]:
        for origin, obtained in zip(corpus.origins, files, strict=True):
            for stretch in origin.read(obtained, languages, unpacked):
                yield origin.domain, stretch

    def cleaned(group: Iterable[tuple[str, Stretch]]) -> Iterator[Labelled]:
        seen: set[bytes] = set()
        for domain, stretch in group:
            pairs = counted(stretch)
            for pair in clean(pairs, corpus.cleaning, languages, removed, seen, workers):
                kept[stretch.name] += 1
                yield domain, pair

    def labelled() -> Iterator[Labelled]:
        for part, group in groupby(stretches(), lambda labelled: labelled[1].part):
            if part == "train":
                yield from corpus.split.divide(cleaned(group), seed)
            else:
                pairs = chain.from_iterable(counted(stretch) for _, stretch in group)
                for pair in normalise(pairs, corpus.cleaning.normalisation):
                    yield part, pair

    progress = tqdm(labelled(), desc="pairs", unit="", unit_scale=True, disable=None)
    parts = _write(folder, progress, languages)
    shutil.rmtree(unpacked, ignore_errors=True)
    _require("with text on both sides", corpus.with_text, with_text)
    _require("in the end", corpus.expected, {part: size["pairs"] for part, size in parts.items()})
    return {
        "left_out": dict(left_out),
        "read": dict(read),
        "removed": dict(removed),
        "kept": dict(kept),
        "parts": parts,
        "in_both": _in_both(folder, languages),
    }


def _write(
    folder: Path, pairs: Iterable[Labelled], languages: tuple[str, str]
) -> dict[str, dict[str, int]]:
    """Write all parts at once; returns the pairs and words of each."""
    words = [f"words_{language}" for language in languages]
    sizes: dict[str, dict[str, int]] = {}
    out: dict[str, list[TextIO]] = {}
    with ExitStack() as stack:

        def open_part(part: str) -> None:
            sizes[part] = dict.fromkeys(("pairs", *words), 0)
            paths = [folder / f"{part}.{language}" for language in languages]
            out[part] = [
                stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
                for path in paths
            ]

        for part in ("train", "valid", "test"):
            open_part(part)
        for part, pair in pairs:
            if part not in out:
                open_part(part)
            sizes[part]["pairs"] += 1
            for file, text, counted in zip(out[part], pair, words, strict=True):
                file.write(f"{text}\n")
                sizes[part][counted] += len(text.split())
    return sizes


def _require(when: str, expected: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Raise if a part has another number of pairs than it should."""
    if any(found[part] != number for part, number in expected.items()):
        relevant = {part: found[part] for part in expected}
        raise DataPrepError(
            f"The corpus has other numbers of pairs {when} than it should: expected "
            f"{counts(expected)}, found {counts(relevant)}. Either the files are not the published "
            "ones, or they are read wrongly."
        )


def _in_both(folder: Path, languages: tuple[str, str]) -> dict[str, dict[str, dict[str, int]]]:
    """How much of the held-out parts is also in training, and of the test set in validation."""

    def pairs(part: str) -> Iterator[Pair]:
        return map(Pair, *(read_text(folder / f"{part}.{language}") for language in languages))

    valid, test = list(pairs("valid")), list(pairs("test"))
    return {
        **overlap({"valid, in train": valid, "test, in train": test}, pairs("train"), languages),
        **overlap({"test, in valid": test}, valid, languages),
    }


def counts(numbers: Mapping[str, int]) -> str:
    """For a sentence."""
    return ", ".join(f"{name} {number:,}" for name, number in numbers.items())
