"""Learns one subword vocabulary for both languages and cuts text into its pieces."""

import io
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import sentencepiece

from dataprep import DataPrepError


def train_model(sentences: Iterable[str], vocab_size: int, path: Path) -> None:
    """Learn byte-pair encoding and write it as a sentencepiece model; the same bytes in every run.

    Args:
        vocab_size: pieces in the vocabulary, the three special ones included.

    Raises:
        DataPrepError: the text is too small for such a vocabulary.
    """
    # Given a path to write to, sentencepiece would record it in the model, by which two runs in
    # different folders would differ.
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            # The text is normalised already, and what sacrebleu sees must be what was cut.
            normalization_rule_name="identity",
            # Several threads may order pieces of equal frequency differently from run to run.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataPrepError(
            f"No vocabulary of {vocab_size:,} pieces can be learnt from this text; choose "
            f"another --vocab-size. sentencepiece says: {error}"
        ) from error
    path.write_bytes(model.getvalue())


def encode_lines(model: Path, lines: list[str]) -> list[str]:
    """Cut lines into pieces, separated by spaces, as fairseq-preprocess reads them."""
    return [" ".join(pieces) for pieces in _processor(model).encode(lines, out_type=str)]


def write_dictionary(model: Path, path: Path) -> None:
    """Write the vocabulary as a fairseq dictionary, without the special symbols: fairseq adds its
    own. The count beside each piece is a formality to it."""
    processor = _processor(model)
    pieces = [
        processor.id_to_piece(i)
        for i in range(processor.get_piece_size())
        if not (processor.is_control(i) or processor.is_unknown(i))
    ]
    path.write_text("".join(f"{piece} 1\n" for piece in pieces), encoding="utf-8")


@cache
def _processor(model: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model))
