"""The steps that make tokens/ and subwords/: from text to the pieces that a model reads."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

from dataprep import bpe, sentencepiece_model
from dataprep.moses import Moses, tokenise
from dataprep.parallel import chunks, ordered_map
from dataprep.steps import Report
from dataprep.texts import read_text

log = logging.getLogger(__name__)

MODEL = "joint.model"
DICTIONARY = "dict.txt"
CODES = "codes.bpe"

MapLines = Callable[[list[str]], list[str]]

LEARNING_LINES = 2_000_000
"""A vocabulary is learnt from no more lines than this, evenly spread: sentencepiece holds them all
in memory, and subword-nmt all their different words."""


def make_tokens(
    folder: Path,
    text: Path,
    languages: tuple[str, str],
    parts: Sequence[str],
    moses: Moses,
    workers: int,
) -> Report:
    """Write the text of `text` as the Moses tokeniser divides it, in files of the same names.

    Returns:
        The number of tokens in each file.
    """
    return {
        "tokens": _map_parts(
            lambda language: partial(tokenise, language=language, moses=moses),
            text,
            folder,
            languages,
            parts,
            workers,
        )
    }


def make_bpe_subwords(
    folder: Path,
    tokens: Path,
    languages: tuple[str, str],
    parts: Sequence[str],
    merges: int,
    workers: int,
) -> Report:
    """Learn joint BPE on the training part of `tokens`, and cut all parts by it.

    Returns:
        The lines that it was learnt from, and the number of pieces in each file.

    Raises:
        DataPrepError: the text is too small for so many merge operations.
    """
    log.info("learning %d merge operations", merges)
    step, learnt_from = _sampling(tokens, languages)
    bpe.learn_codes(_training(tokens, languages, step), merges, folder / CODES)
    encode = partial(bpe.encode_lines, folder / CODES)
    return {
        "learnt_from_lines": learnt_from,
        "tokens": _map_parts(lambda _: encode, tokens, folder, languages, parts, workers),
    }


def make_sentencepiece_subwords(
    folder: Path,
    text: Path,
    languages: tuple[str, str],
    parts: Sequence[str],
    vocab_size: int,
    workers: int,
) -> Report:
    """Learn a joint vocabulary on the training part of `text`, and cut all parts by it.

    Returns:
        The size of the dictionary, the lines that it was learnt from, and the number of pieces in
        each file.

    Raises:
        DataPrepError: the text is too small for such a vocabulary.
    """
    log.info("learning a joint vocabulary of %d pieces", vocab_size)
    step, learnt_from = _sampling(text, languages)
    sentences = _training(text, languages, step)
    sentencepiece_model.train_model(sentences, vocab_size, folder / MODEL)
    pieces = sentencepiece_model.write_dictionary(folder / MODEL, folder / DICTIONARY)
    encode = partial(sentencepiece_model.encode_lines, folder / MODEL)
    return {
        "pieces": pieces,
        "learnt_from_lines": learnt_from,
        "tokens": _map_parts(lambda _: encode, text, folder, languages, parts, workers),
    }


def _sampling(folder: Path, languages: tuple[str, str]) -> tuple[int, int]:
    """Every how many lines of the training text to learn from, and how many those are."""
    total = sum(1 for _ in _training(folder, languages, 1))
    step = max(1, -(-total // LEARNING_LINES))
    return step, -(-total // step)


def _training(folder: Path, languages: tuple[str, str], step: int) -> Iterator[str]:
    sides = (read_text(folder / f"train.{language}") for language in languages)
    return islice(chain.from_iterable(sides), 0, None, step)


def _map_parts(
    function: Callable[[str], MapLines],
    source: Path,
    folder: Path,
    languages: tuple[str, str],
    parts: Sequence[str],
    workers: int,
) -> dict[str, int]:
    """Write what the function for each language makes of its side of all parts.

    Returns:
        The number of words in each file that is written.
    """
    return {
        f"{part}.{language}": _map_lines(
            function(language),
            source / f"{part}.{language}",
            folder / f"{part}.{language}",
            workers,
        )
        for part in parts
        for language in languages
    }


def _map_lines(function: MapLines, source: Path, target: Path, workers: int) -> int:
    """Write what `function` makes of the lines of a file; returns the number of words in that."""
    words = 0
    with target.open("w", encoding="utf-8", newline="\n") as out:
        for lines in ordered_map(function, chunks(read_text(source)), workers):
            out.writelines(f"{line}\n" for line in lines)
            words += sum(len(line.split(" ")) for line in lines)
    return words
