"""Admin, which measures on the data of all ranks, on two ranks of fairseq-train."""

from __future__ import annotations

import pytest
from test_processes import train_on_two_ranks


@pytest.mark.slow
def test_two_ranks_of_fairseq_train_as_one(corpus, tmp_path):
    """fairseq itself stops ranks whose gradients have different norms."""
    ranks = train_on_two_ranks(corpus.translation, tmp_path, how=("--init-scheme", "admin"))
    assert [outcome.code for outcome in ranks] == [0, 0], ranks[0].output + ranks[1].output
    assert len(ranks[0].updates) == 2
