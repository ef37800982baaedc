"""Inside `deterministic` a model is deterministic; after it, nothing shows that it was used."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_gradinit.engine.determinism import deterministic


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.9))
    )


def test_dropout_is_off_inside_and_back_after(model):
    """And tasks cannot switch the mode of the model."""
    x = torch.randn(8, 4)
    model[3].eval()
    with deterministic(model):
        assert torch.equal(model(x), model(x))
        assert not model[2].training
        assert model.train() is model
        assert torch.equal(model.train()(x), model(x))
        model.eval()
        assert model[1].training
    assert [m.training for m in model.modules()] == [True] * 4 + [False] * 2
    assert not torch.equal(model(x), model(x))
    assert "train" not in vars(model)
    assert not model.eval().training
    lstm = nn.LSTM(3, 3, num_layers=2, dropout=0.7)
    x = torch.randn(5, 2, 3)
    with deterministic(lstm):
        assert lstm.training
        assert torch.equal(lstm(x)[0], lstm(x)[0])
    assert lstm.dropout == 0.7


def test_batch_norm_uses_the_batch_and_its_statistics_come_back(model):
    before = {name: value.clone() for name, value in model.named_buffers()}
    x = torch.randn(8, 4) + 7.0
    with deterministic(model):
        assert abs(float(model(x).mean().detach())) < 1e-5
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed() -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)


@pytest.mark.parametrize("error", [False, True])
def test_random_numbers_continue_as_if_nothing_had_happened(model, error):
    seed()
    expected = draw()
    seed()
    with contextlib.suppress(ZeroDivisionError), deterministic(model):
        assert draw() == expected
        draw()
        if error:
            raise ZeroDivisionError
    assert draw() == expected
    assert all(m.training for m in model.modules())
    assert "train" not in vars(model)


class Stateful(nn.Module):
    """Keeps an account of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("moved", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("missing", None)
        self.calls = 0
        self.cache = self.forgotten = [1]

    def forward(self) -> None:
        self.moved += 1.0
        self.replaced = self.replaced + 1.0
        self.missing = torch.ones(2)
        self.calls += 1
        self.cache = [2]
        self.extra = 3
        self.__dict__.pop("forgotten", None)

    def account(self) -> str:
        held = {n: v for n, v in vars(self).items() if not n.startswith("_")}
        return f"{held} {self._buffers}"


def test_buffers_and_attributes_come_back_and_parameters_stay():
    module = Stateful()
    before, cache = module.account(), module.cache
    with deterministic(nn.Sequential(module)):
        module()
        module()
        assert module.calls == 2
        with torch.no_grad():
            module.weight.mul_(3.0)
        handle = module.register_forward_hook(lambda *_: None)
    assert module.account() == before
    assert module.cache is cache
    assert module.weight.tolist() == [3.0, 3.0]
    assert handle.id in module._forward_hooks
