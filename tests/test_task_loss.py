"""The loss of a sample, for tasks and criteria that do what they want with the sample."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GRADINIT, train_here, usual_options
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.tasks.fairseq_task import FairseqTask
from test_train import same
from torch import nn

from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.plugin.batches import MicroBatch
from fairseq_gradinit.plugin.loss import TaskLoss


@register_criterion("spoiling")
class Spoiling(CrossEntropyCriterion):
    """Uses a sample up."""

    def forward(self, model, sample, reduce=True):
        found = super().forward(model, sample, reduce)
        sample["net_input"].pop("src_tokens")
        sample["id"].zero_()
        del sample["target"]
        return found


class Model(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 1)
        self.told = []

    def set_num_updates(self, num_updates: int) -> None:
        self.told = [*self.told, num_updates]


def popping(model, sample):
    return model(sample["net_input"].pop("x")).sum(), 1, {}


def writing(model, sample):
    loss = model(sample["net_input"]["x"]).sum()
    sample["net_input"]["x"].add_(1.0)
    sample["lengths"] += 1
    return loss + float(sample["lengths"].sum()) + len(sample["words"]), 1, {}


def growing(model, sample):
    sample["words"].append("more")
    return writing(model, sample)


class ChangingTask(FairseqTask):
    """Modifies the sample before the criterion sees it."""

    def train_step(self, sample, *args, **kwargs):
        sample["net_input"]["x"] = sample["net_input"]["x"].mul_(2.0)
        return super().train_step(sample, *args, **kwargs)


def trainer(task: FairseqTask, criterion) -> SimpleNamespace:
    model = Model()
    return SimpleNamespace(
        task=task, get_model=lambda: model, get_criterion=lambda: criterion, model=model
    )


@pytest.mark.parametrize("task", [FairseqTask, ChangingTask])
@pytest.mark.parametrize("criterion", [popping, writing, growing])
def test_loss_does_not_depend_on_how_often_a_sample_was_evaluated(task, criterion):
    run = trainer(task(SimpleNamespace()), criterion)
    sample = {"net_input": {"x": torch.ones(2, 3)}, "lengths": np.ones(2), "words": ["one"]}
    loss = TaskLoss(run)
    with deterministic(run.model):
        values = [loss(MicroBatch(np.arange(2), sample))[0].item() for _ in range(3)]
    assert len(set(values)) == 1
    assert sample["net_input"]["x"].tolist() == [[1.0] * 3] * 2
    assert sample["lengths"].tolist() == [1.0, 1.0]
    assert sample["words"] == ["one"]


def test_sample_that_a_criterion_sees_is_like_the_one_that_was_collated():
    Pair = namedtuple("Pair", "one two")
    shared = torch.ones(2, 3)
    sample = OrderedDict(x=shared, pair=Pair(shared, (None, {"a": [shared]})), empty=[])
    seen = []

    def criterion(model, sample):
        seen.append(sample)
        return model(sample["x"]).sum(), 1, {}

    run = trainer(FairseqTask(SimpleNamespace()), criterion)
    with deterministic(run.model):
        TaskLoss(run)(MicroBatch(np.arange(2), sample))
    (found,) = seen
    assert type(found) is OrderedDict
    assert type(found["pair"]) is Pair
    assert found["empty"] == []
    assert found["pair"].one is found["x"] is found["pair"].two[1]["a"][0]
    assert found["x"] is not shared


def test_model_is_told_a_number_of_updates_once():
    run = trainer(FairseqTask(SimpleNamespace()), lambda model, x: (model(x).sum(), 1, {}))
    loss = TaskLoss(run)
    with deterministic(run.model):
        for _ in range(3):
            loss(MicroBatch(np.arange(2), torch.ones(2, 3)))
        assert run.model.told == [0]
    assert run.model.told == []
    run.model.set_num_updates(7)
    run.model.set_num_updates(7)
    assert run.model.told == [7, 7]


def test_criterion_that_uses_samples_up_learns_what_the_usual_one_learns(corpus, tmp_path):
    base = usual_options("--criterion", "--label-smoothing")
    # A bound on the norm of the gradient that takes products with the Hessian.
    options = ["--gradinit-gamma", "1", "--gradinit-iterations", "2", "--max-update", "1"]

    def learn(name: str):
        options_of = ["--criterion", name, *GRADINIT, *options]
        return train_here(corpus.translation, tmp_path / name, *options_of, base=base)

    usual, spoiling = learn("cross_entropy"), learn("spoiling")
    assert spoiling.code == 0, spoiling.output
    assert same(spoiling.first, usual.first)
    assert not same(spoiling.first, spoiling.initial)
