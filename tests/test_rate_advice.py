"""Whoever asks for too much without warmup is told so, and nobody else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import GRADINIT, train_here

from fairseq_gradinit.blocks import Block
from fairseq_gradinit.rate_advice import short_warmup_advice

# 128 x 512, 65,536 elements.
FC1 = Block("encoder.layers.0.fc1.weight", torch.nn.Parameter(torch.ones(512, 128)), "learned")
WIDE = Block("encoder.embed_tokens.weight", torch.nn.Parameter(torch.ones(9000, 128)), "learned")


def config(lr=4e-3, optimizer="adam", warmup=0, max_update=2000):
    schedule = SimpleNamespace() if warmup is None else SimpleNamespace(warmup_updates=warmup)
    return SimpleNamespace(
        optimizer=SimpleNamespace(_name=optimizer),
        lr_scheduler=schedule,
        optimization=SimpleNamespace(lr=[lr], max_update=max_update),
    )


def test_a_rate_that_failed_is_named_with_a_warmup_that_was_enough():
    advice = short_warmup_advice(config(), [WIDE, FC1])
    assert "--lr 0.004 times the square root of 65,536, the size of fc1, is 1.02" in advice
    assert advice.endswith(": --warmup-updates 140")
    endless = short_warmup_advice(config(max_update=0), [FC1])
    assert endless.endswith("some 7 % of training")


def test_a_rate_that_failed_for_a_wider_model_is_named():
    wide = Block(FC1.name, torch.nn.Parameter(torch.ones(1024, 512)), "learned")
    assert "is 0.72: at 0.7 and more" in short_warmup_advice(config(lr=1e-3), [wide])
    assert short_warmup_advice(config(lr=7e-4), [wide]) is None


@pytest.mark.parametrize(
    "changes",
    [{"lr": 2e-3}, {"optimizer": "sgd"}, {"optimizer": "new"}, {"warmup": 1}, {"warmup": None}],
    ids=str,
)
def test_other_runs_are_left_alone(changes):
    assert short_warmup_advice(config(**changes), [WIDE, FC1]) is None


def test_models_without_such_a_branch_are_left_alone():
    assert short_warmup_advice(config(), [WIDE]) is None


def test_a_run_says_it(corpus, tmp_path):
    # 32 x 64 elements.
    run = train_here(corpus.translation, tmp_path, *GRADINIT, "--lr", "0.03", "--max-update", "1")
    (line,) = run.lines("the size of fc1")
    assert line.startswith("WARNING")
    assert line.endswith("--warmup-updates 1")
