"""Inside `quiet` a model is deterministic; after it, nothing shows that it was used."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_gradinit.quiet import quiet


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.9))
    )


def test_dropout_is_off_inside_and_back_after(model):
    x = torch.randn(8, 4)
    model[3].eval()
    with quiet(model):
        assert torch.equal(model(x), model(x))
        assert not model[2].training
    assert [m.training for m in model.modules()] == [True] * 4 + [False] * 2
    assert not torch.equal(model(x), model(x))


def test_tasks_cannot_switch_the_mode_of_the_model(model):
    x = torch.randn(8, 4)
    with quiet(model):
        assert model.train() is model
        assert torch.equal(model.train()(x), model(x))
        model.eval()
        assert model[1].training
    assert "train" not in vars(model)
    assert not model.eval().training


def test_batch_norm_uses_the_batch_and_its_statistics_come_back(model):
    before = {name: value.clone() for name, value in model.named_buffers()}
    x = torch.randn(8, 4) + 7.0
    with quiet(model):
        assert abs(float(model(x).mean().detach())) < 1e-5
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_recurrent_layers_lose_their_dropout_but_stay_in_training_mode():
    lstm = nn.LSTM(3, 3, num_layers=2, dropout=0.7)
    x = torch.randn(5, 2, 3)
    with quiet(lstm):
        assert lstm.training
        assert torch.equal(lstm(x)[0], lstm(x)[0])
    assert lstm.dropout == 0.7


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_numbers_go_on_as_if_nothing_had_happened(model):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with quiet(model):
        assert draw() == expected
        draw()
    assert draw() == expected


def test_everything_comes_back_after_an_error(model):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with contextlib.suppress(ZeroDivisionError), quiet(model):
        raise ZeroDivisionError(draw())
    assert draw() == expected
    assert all(m.training for m in model.modules())
    assert "train" not in vars(model)
