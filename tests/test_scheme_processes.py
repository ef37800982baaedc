"""Schemes on two ranks of fairseq-train."""

from __future__ import annotations

import pytest
from test_processes import train_on_two_ranks

from fairseq_gradinit.schemes.options import SCHEMES


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, found in SCHEMES.items() if found.initialise])
def test_two_ranks_of_fairseq_train_as_one(corpus, tmp_path, name):
    """fairseq itself stops ranks whose gradients have different norms."""
    ranks = train_on_two_ranks(corpus.translation, tmp_path, how=("--init-scheme", name))
    assert [outcome.code for outcome in ranks] == [0, 0], ranks[0].output + ranks[1].output
    assert len(ranks[0].updates) == 2
