"""In fairseq: autocast, activation checkpointing, too little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import GRADINIT, SCALES_ALONE, Corpus, Training, train_here
from fairseq.tasks.fairseq_task import FairseqTask
from test_train import STANDSTILL, scales_in

from fairseq_gradinit.plugin.loss import TaskLoss

# With ReLU, whose slope jumps, the derivative of the gradient norm depends on the way it is taken.
CONSTRAINED = ["--gradinit-gamma", "30", "--activation-fn", "gelu"]


def differences(one: Path, other: Path) -> list[float]:
    """Of the scales in two folders, in rising order."""
    first, second = scales_in(one), scales_in(other)
    assert first.keys() == second.keys()
    return sorted(abs(first[name] - second[name]) for name in first)


def learn(corpus: Corpus, folder: Path, *options: str) -> Training:
    run = train_here(corpus.translation, folder, *GRADINIT, *STANDSTILL, *options)
    assert run.code == 0, run.output
    return run


def test_bf16_moves_the_scales_a_little_and_leaves_nothing_behind(corpus, tmp_path, monkeypatch):
    """Also where the task switches autocast off, as fairseq's train_step does on GPUs."""
    plain = FairseqTask.train_step

    def train_step(*arguments, **named):
        with torch.autocast("cpu", enabled=False):
            return plain(*arguments, **named)

    monkeypatch.setattr(FairseqTask, "train_step", train_step)
    learn(corpus, tmp_path / "fp32", *SCALES_ALONE)
    run = learn(corpus, tmp_path / "bf16", *SCALES_ALONE, "--gradinit-precision", "bf16")
    # Three iterations of about 1e-2 each, whose direction rounding decides where it is a toss-up.
    found = differences(tmp_path / "bf16", tmp_path / "fp32")
    assert 0.0 < found[-1] < 6e-2
    assert found[int(0.95 * len(found))] < 2e-3
    assert "|precision:bf16|" in run.output
    model = run.trainer.get_model()
    assert "forward" not in vars(model)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow
def test_finite_differences_lead_to_nearly_the_same_scales(corpus, tmp_path):
    """Also with activation checkpointing, which has no exact products."""
    exact = [*CONSTRAINED, "--gradinit-second-order", "exact"]
    learn(corpus, tmp_path / "exact", *exact)
    run = learn(corpus, tmp_path / "auto", *CONSTRAINED, "--checkpoint-activations")
    assert differences(tmp_path / "auto", tmp_path / "exact")[-1] < 3e-3
    assert "|second-order:finite-difference|" in run.output
    options = [*GRADINIT, *exact, "--checkpoint-activations"]
    refused = train_here(corpus.translation, tmp_path / "refused", *options)
    assert "cannot be differentiated twice" in refused.error()
    assert "set second-order to finite-difference" in refused.error()


@pytest.mark.slow
def test_a_batch_that_does_not_fit_in_memory_is_cut(corpus, tmp_path, monkeypatch):
    plain = TaskLoss.__call__

    def little_memory(self, batch):
        if len(batch.indices) > 20:
            raise torch.OutOfMemoryError("out of memory")
        return plain(self, batch)

    learn(corpus, tmp_path / "whole")
    monkeypatch.setattr(TaskLoss, "__call__", little_memory)
    cut = learn(corpus, tmp_path / "cut")
    assert cut.lines("with each micro-batch in ")
    assert differences(tmp_path / "whole", tmp_path / "cut")[-1] < 1e-3
