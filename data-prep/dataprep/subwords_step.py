"""The steps that make tokens/ and subwords/: from text to the pieces that a model reads."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

from dataprep import bpe, sentencepiece_model
from dataprep.moses import Moses, tokenise
from dataprep.parallel import chunks, ordered_map
from dataprep.texts import read_text

DICTIONARY = "dict.txt"
LEARNING_LINES = 2_000_000
"""A vocabulary is learnt from no more lines than this, evenly spread: sentencepiece holds them all
in memory, and subword-nmt all their different words."""

# In all that follows, `names` are those of the files in a folder: PART.LANGUAGE.


def make_tokens(text: Path, names: Sequence[str], moses: Moses, workers: int, folder: Path) -> None:
    """Write the files in `text` as the Moses tokeniser divides them."""
    for name in names:
        language = name.rpartition(".")[2]
        function = partial(tokenise, language=language, moses=moses)
        _map_lines(function, text / name, folder / name, workers)


def make_bpe_subwords(
    source: Path, names: Sequence[str], vocab_size: int, workers: int, folder: Path
) -> None:
    """Learn joint BPE on the training files in `source`, and cut all files by it.

    Raises:
        DataPrepError: the text is too small for so many merge operations.
    """
    codes = folder / "codes.bpe"
    bpe.learn_codes(_learning_lines(source, names), vocab_size, codes)
    for name in names:
        _map_lines(partial(bpe.encode_lines, codes), source / name, folder / name, workers)


def make_sentencepiece_subwords(
    source: Path, names: Sequence[str], vocab_size: int, workers: int, folder: Path
) -> None:
    """Learn a joint vocabulary on the training files in `source`, and cut all files by it.

    Raises:
        DataPrepError: the text is too small for such a vocabulary.
    """
    model = folder / "joint.model"
    sentencepiece_model.train_model(_learning_lines(source, names), vocab_size, model)
    sentencepiece_model.write_dictionary(model, folder / DICTIONARY)
    encode = partial(sentencepiece_model.encode_lines, model)
    for name in names:
        _map_lines(encode, source / name, folder / name, workers)


def _learning_lines(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """All training text, or every n-th line if it is long."""

    def training() -> Iterator[str]:
        sides = (read_text(folder / name) for name in names if name.startswith("train."))
        return chain.from_iterable(sides)

    total = sum(1 for _ in training())
    step = max(1, -(-total // LEARNING_LINES))
    return islice(training(), 0, None, step)


def _map_lines(
    function: Callable[[list[str]], list[str]], source: Path, target: Path, workers: int
) -> None:
    """Write what `function` makes of the lines of a file."""
    with target.open("w", encoding="utf-8", newline="\n") as out:
        for lines in ordered_map(function, chunks(read_text(source)), workers):
            out.writelines(f"{line}\n" for line in lines)
