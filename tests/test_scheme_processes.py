"""Several processes end with the same weights, those of one process with all of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import run_command
from test_processes import train_on_two_ranks

from fairseq_gradinit.schemes.options import SCHEMES

RANK = Path(__file__).with_name("scheme_rank.py")


def test_two_processes_agree_with_each_other_and_with_one(tmp_path):
    launcher = ("torchrun", "--standalone", "--nproc-per-node", "2")
    done = run_command(*launcher, RANK, tmp_path)
    assert done.code == 0, done.output
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    done = run_command("python", RANK, tmp_path)
    assert done.code == 0, done.output
    omegas, quotients, weights = json.loads((tmp_path / "0.json").read_text())
    for side, values in omegas.items():
        assert one[0][side] == pytest.approx(values, rel=1e-6)
    assert one[1] == pytest.approx(quotients, rel=1e-6)
    for found, expected in zip(one[2], weights, strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


@pytest.mark.parametrize("name", [name for name, found in SCHEMES.items() if found.initialise])
def test_two_ranks_of_fairseq_train_as_one(corpus, tmp_path, name):
    """fairseq itself stops ranks whose gradients have different norms."""
    short = ("--init-scheme-iterations", "2") if name == "metainit" else ()
    ranks = train_on_two_ranks(corpus.translation, tmp_path, how=("--init-scheme", name, *short))
    assert [outcome.code for outcome in ranks] == [0, 0], ranks[0].output + ranks[1].output
    assert len(ranks[0].updates) == 2
