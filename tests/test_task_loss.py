"""The loss of a sample, for tasks and criteria that do what they want with the sample."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.tasks.fairseq_task import FairseqTask
from torch import nn

from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.plugin.batches import MicroBatch
from fairseq_gradinit.plugin.loss import TaskLoss


def popping(model, sample):
    return model(sample["net_input"].pop("x")).sum(), 1, {}


def writing(model, sample):
    loss = model(sample["net_input"]["x"]).sum()
    sample["net_input"]["x"].add_(1.0)
    sample["lengths"] += 1
    sample["words"].append("more")
    return loss + float(sample["lengths"].sum()) + len(sample["words"]), 1, {}


class ChangingTask(FairseqTask):
    """Modifies the sample before the criterion sees it."""

    def train_step(self, sample, *args, **kwargs):
        sample["net_input"]["x"] = sample["net_input"]["x"].mul_(2.0)
        return super().train_step(sample, *args, **kwargs)


@pytest.mark.parametrize("task", [FairseqTask, ChangingTask])
@pytest.mark.parametrize("criterion", [popping, writing])
def test_loss_does_not_depend_on_how_often_a_sample_was_evaluated(task, criterion):
    model = nn.Linear(3, 1)
    model.set_num_updates = lambda number: None
    loss = TaskLoss(
        SimpleNamespace(
            task=task(SimpleNamespace()), get_model=lambda: model, get_criterion=lambda: criterion
        )
    )
    sample = {"net_input": {"x": torch.ones(2, 3)}, "lengths": np.ones(2), "words": ["one"]}
    with deterministic(model):
        values = [loss(MicroBatch(np.arange(2), sample))[0].item() for _ in range(3)]
    assert len(set(values)) == 1
    assert sample["net_input"]["x"].tolist() == [[1.0] * 3] * 2
    assert sample["lengths"].tolist() == [1.0, 1.0]
    assert sample["words"] == ["one"]
