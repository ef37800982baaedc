"""Inside `deterministic` a model is deterministic; after it, nothing shows that it was used."""

from __future__ import annotations

import contextlib
import random
from collections import deque

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
    """Keeps an account of its calls in every way that a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.view = self.weight[:1]
        self.weights = [self.weight]
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("missing", None)
        self.calls = 0
        self.running = torch.zeros(2)
        self.array = np.zeros(2)
        self.cache: list[list[int]] = [[]]
        self.incremental = {"state": {"keys": torch.zeros(2)}}
        self.seen, self.recent = {1}, deque([1], maxlen=2)
        self.pair = (torch.zeros(2), [])
        self.forgotten = self.itself = [self]

    def forward(self) -> None:
        self.calls += 1
        self.replaced = self.replaced + 1.0
        self.missing = torch.ones(2)
        self.running.mul_(0.9).add_(1.0)
        self.array += 1.0
        self.cache[0].append(self.calls)
        self.cache.append([])
        self.incremental["state"]["keys"] += 1.0
        self.incremental["state"]["values"] = 1
        self.seen.add(2)
        self.recent.append(2)
        self.pair[0].add_(1.0)
        self.pair[1].append(1)
        self.extra = self.running
        self.__dict__.pop("forgotten", None)

    def account(self) -> str:
        modes = {"weight", "view", "weights", "itself", "forgotten"}
        held = {n: v for n, v in vars(self).items() if not n.startswith("_") and n not in modes}
        return f"{held} {self._buffers}"


def test_plain_attributes_that_calls_change_come_back():
    module = Stateful()
    before, cache = module.account(), module.cache
    with deterministic(nn.Sequential(module)):
        module()
        module()
        assert module.calls == 2
        assert module.account() != before
    assert module.account() == before
    assert module.cache is cache
    assert module.forgotten == [module]
    assert module.recent.maxlen == 2


def test_parameters_may_change_inside_whoever_else_holds_them():
    module = Stateful()
    with deterministic(module), torch.no_grad():
        module.weight.mul_(3.0)
        handle = module.register_forward_hook(lambda *_: None)
    assert module.weight.tolist() == [3.0, 3.0]
    assert module.view.tolist() == [3.0]
    assert module.weights[0] is module.weight
    assert handle.id in module._forward_hooks
