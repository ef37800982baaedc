"""Texts that nobody would write, from prepare.py to a training with GradInit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import GRADINIT, SCALES_ALONE, train_here
from fairseq.data import Dictionary, data_utils

# Fixtures among them.
from test_data_prep_pipeline import fairseq_here, instant_fairseq  # noqa: F401
from test_data_prep_published import (  # noqa: F401
    PAIRS,
    command,
    pin,
    sentences,
    site,
    write_gzip,
)

ROWS = (
    "a \0 in \0the\0 text",
    "\x01\x02 bell \x07 escape \x1b[2J \x7f",
    # Right-to-left marks, and marks that are never taken back.
    "\u202eright\u202c to \u2067left\u2069 \u05e9\u05dc\u05d5\u05dd \u200f.",
    # Ends of lines for some programs.
    "one\x1ctwo\u0085three\u2028four\u2029five",
    "\u0301\u0302 \ufeff \u200b\u200d",
    "\ufffe \U0010ffff \ufffd",
    "\U0001f469\u200d\U0001f52c \U0001d504",
    "@@ @-@ </w> \u2581 \u2581\u2581 <unk> <s> </s> <pad> &lt;unk&gt;",
    "w" * 5000,
    "x",
    "",
    " \t \u3000 ",
)


@pytest.fixture
def hostile(pin, site) -> dict[str, list[str]]:  # noqa: F811
    """Puts the rows beside themselves and beside others; returns both sides as they should be."""
    found = {}
    for language, shifted in (("de", ROWS), ("en", (*ROWS[1:], ROWS[0]))):
        lines = sentences("train", language)
        lines[10:22], lines[30:42] = ROWS, shifted
        write_gzip(site / f"train.{language}.gz", lines)
        found[language] = [" ".join(line.split()) for line in lines]
    pin()
    return found


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


@pytest.mark.usefixtures("fairseq_here")
def test_no_sentence_gets_lost_or_moves_up_to_a_training(command, site, hostile, tmp_path):  # noqa: F811
    assert command("--mirror", site, "--vocab-size", "200") == 0
    data = tmp_path / "out/data-bin"
    dictionary = Dictionary.load(str(data / "dict.de.txt"))
    for language, lines in hostile.items():
        assert lines_of(tmp_path / f"out/text/train.{language}") == lines
        binary = data_utils.load_indexed_dataset(str(data / f"train.de-en.{language}"), dictionary)
        assert len(binary) == PAIRS["train"]
        # What has no text has no tokens.
        assert [len(row) == 1 for row in binary] == [not line for line in lines]
    options = [*GRADINIT, *SCALES_ALONE, "--max-update", "2", "--no-save"]
    run = train_here(data, tmp_path / "run", *options, "--max-source-positions", "100")
    assert run.code == 0, run.output
    assert len(run.updates) == 2
    assert all(torch.isfinite(tensor).all() for tensor in run.weights.values())


@pytest.mark.usefixtures("instant_fairseq")
def test_words_keep_their_lines_through_moses_and_bpe(command, site, hostile, tmp_path):  # noqa: F811
    assert command("--mirror", site, "--tokenisation", "moses+bpe") == 0
    for language, lines in hostile.items():
        pieces = lines_of(tmp_path / f"out/subwords/train.{language}")
        assert [not row for row in pieces] == [not line for line in lines]
        assert all(" ".join(row.split()) == row for row in pieces)
