"""Inside `deterministic` a model is deterministic; after it, nothing shows that it was used."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from scheme_models import build, outputs
from torch import nn

from fairseq_gradinit.engine.determinism import deterministic, seed_everything


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
        assert torch.equal(model.train()(x), model(x))
        assert model.eval()[1].training
    assert [m.training for m in model.modules()] == [True] * 4 + [False] * 2
    assert not torch.equal(model(x), model(x))
    assert not model.eval().training


def test_batch_norm_uses_the_batch_and_its_statistics_come_back(model):
    before = {name: value.clone() for name, value in model.named_buffers()}
    x = torch.randn(8, 4) + 7.0
    with deterministic(model):
        assert abs(float(model(x).mean().detach())) < 1e-5
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_numbers_continue_as_if_nothing_had_happened(model):
    """Also after an error."""
    seed_everything(1)
    expected = draw()
    seed_everything(1)
    with contextlib.suppress(ZeroDivisionError), deterministic(model):
        assert draw() == expected
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
        self.register_buffer("missing", None)
        self.calls = 0
        self.cache = [1]

    def forward(self) -> None:
        self.moved += 1.0
        self.missing = torch.ones(2)
        self.calls += 1
        self.cache = [2]
        self.extra = 3


def test_buffers_and_attributes_come_back_and_parameters_stay():
    module = Stateful()
    with deterministic(nn.Sequential(module)):
        module()
        module()
        assert module.calls == 2
        module.weight.data.mul_(3.0)
    assert module.moved.eq(0.0).all()
    assert module.missing is None
    assert (module.calls, module.cache) == (0, [1])
    assert not hasattr(module, "extra")
    assert module.weight.tolist() == [3.0, 3.0]


def test_fairseq_s_noise_is_off_inside_and_on_again_afterwards():
    noise = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.4)
    noise |= {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5, "quant_noise_pq": 0.5}
    model = build("transformer_iwslt_de_en", **noise, quant_noise_pq_block_size=8)
    expected = outputs(model)
    model.train()
    with deterministic(model):
        assert torch.equal(outputs(model), expected)
        assert torch.equal(outputs(model), expected)
    assert not torch.equal(outputs(model), outputs(model))
