"""The numerics against independent truth: finite differences, and torch's own optimizers."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import (
    central_differences,
    gradients,
    loss_after,
    loss_of,
    make_learner,
    make_model,
    make_pair,
    move_away_from_one,
)
from torch import nn

from fairseq_gradinit.engine.batch_pairs import BatchPair
from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learning import learn_scales
from fairseq_gradinit.errors import GradInitError


class Zoo(nn.Module):
    """Convolution, batch norm, packed attention, recurrence, positions and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(8)
        self.positions = nn.Parameter(torch.randn(4, 8) * 0.1)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.group_norm = nn.GroupNorm(2, 8)
        self.recurrence = nn.GRU(8, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.bilinear = nn.Bilinear(8, 8, 11)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.attention.out_proj.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(tokens).mT)
        x = torch.tanh(self.batch_norm(x)).mT + self.positions
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.tied(self.group_norm(x.mT).mT)
        return self.bilinear(self.recurrence(x)[0], x) * self.temperature


@pytest.fixture
def model() -> nn.Module:
    return make_model()


@pytest.fixture
def zoo() -> nn.Module:
    torch.manual_seed(3)
    return Zoo().double()


@pytest.fixture(params=["model", "zoo"])
def any_model(request) -> nn.Module:
    return request.getfixturevalue(request.param)


@pytest.fixture
def pair() -> BatchPair:
    return make_pair()


@pytest.mark.parametrize("target", ["adam", "sgd", "sgd-normalized", "clipped"])
def test_objective_gradient_equals_central_differences(any_model, pair, target):
    settings = {"target": "sgd", "clip_norm": 0.1} if target == "clipped" else {"target": target}
    model = any_model
    with deterministic(model):
        learner = make_learner(model, **settings)
        move_away_from_one(learner, pair)
        eta = learner.config.eta
        g = gradients(model, pair.first)
        norm = math.sqrt(sum(float((t * t).sum()) for t in g))
        direction = {
            "adam": [t.sign() for t in g],
            "sgd": g,
            "sgd-normalized": [t / norm for t in g],
            "clipped": [t * 0.1 / (norm + 1e-6) for t in g],
        }[target]

        def loss_after_fixed_step():
            return loss_after(model, direction, eta, pair.second)

        found = learner.gradient(pair)
        expected = central_differences(learner, model, loss_after_fixed_step) / eta
        trial_loss = float(loss_after_fixed_step().detach())
    assert found.kind == "objective"
    assert float(found.trial_loss) == pytest.approx(trial_loss, rel=1e-12)
    torch.testing.assert_close(found.by_scales, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("target", "order"), [("adam", 1), ("sgd", 2)])
def test_constraint_gradient_equals_central_differences(any_model, pair, target, order):
    model = any_model
    with deterministic(model):
        learner = make_learner(model, target=target, gamma=1e-3, second_order="exact")
        move_away_from_one(learner, pair)

        def norm():
            flat = torch.cat([g.flatten() for g in gradients(model, pair.first)])
            return torch.linalg.vector_norm(flat, order)

        found = learner.gradient(pair)
        expected = central_differences(learner, model, norm)
        norm_value = float(norm().detach())
    assert found.kind == "constraint"
    assert found.norm == pytest.approx(norm_value, rel=1e-12)
    torch.testing.assert_close(found.by_scales, expected, rtol=1e-5, atol=1e-6)


def test_scale_update_is_adam_on_a_vector_of_scalars(model, pair):
    with deterministic(model):
        learner = make_learner(model, lr=0.02, betas=(0.8, 0.9), min_scale=0.0, max_scale=50.0)
        scales = torch.ones_like(learner.weights.scales, requires_grad=True)
        adam = torch.optim.Adam([scales], lr=0.02, betas=(0.8, 0.9))
        for _ in range(5):
            scales.grad = learner.gradient(pair).by_scales
            adam.step()
            learner.step(pair)
            torch.testing.assert_close(learner.weights.scales, scales, rtol=0, atol=0)


def test_kinds_of_iteration_keep_separate_moments(model, pair):
    """A constraint iteration leaves the moments of the objective alone."""
    with deterministic(model):
        norm = make_learner(model).gradient(pair).norm
        learner = make_learner(model, gamma=norm * 0.999, lr=0.01)
        for _ in range(12):
            learner.step(pair)
    kinds = [iteration.kind for iteration in learner.learned().history]
    assert set(kinds) == {"constraint", "objective"}
    steps = {kind: moments.step for kind, moments in learner.state().moments.items()}
    assert steps == {kind: kinds.count(kind) for kind in steps}


def test_weights_are_restored_to_the_last_bit(model, pair):
    initial = [p.detach().clone() for p in model.parameters()]
    with deterministic(model):
        learner = make_learner(model)
        learner.gradient(pair)
        assert all(map(torch.equal, initial, model.parameters()))
        learner.step(pair)
        learner.weights.restore()
    assert all(map(torch.equal, initial, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_scales_stay_in_their_bounds_and_biases_have_their_own(model, pair):
    with deterministic(model):
        learner = make_learner(model, lr=0.3, min_scale=0.9, min_bias_scale=0.5, max_scale=1.1)
        for _ in range(6):
            learner.step(pair)
    scales = learner.learned().scale_of
    weights = {n: s for n, s in scales.items() if not n.endswith("bias")}
    assert min(weights.values()) == 0.9
    assert max(scales.values()) == 1.1
    assert 0.5 <= min(scales.values()) < 0.9


def test_learning_lowers_the_loss_after_the_trial_step(model, pair):
    learner = make_learner(model)
    with deterministic(model):
        for _ in range(30):
            learner.step(pair)
    history = learner.learned().history
    assert history[-1].trial_loss < history[0].trial_loss - 0.1
    assert [iteration.index for iteration in history] == list(range(1, 31))


def test_batches_that_end_early_are_an_error(model, pair):
    initial = [p.detach().clone() for p in model.parameters()]
    blocks = collect_blocks({"": model}, "fixed")
    with deterministic(model), pytest.raises(GradInitError, match="ended after 2 of 5 iterations"):
        learn_scales(blocks, loss_of(model), [pair] * 2, GradInitConfig(eta=0.05, iterations=5))
    assert all(map(torch.equal, initial, model.parameters()))


def test_a_batch_that_counts_nothing_is_an_error(model, pair):
    learner = make_learner(model, lambda tokens: (loss_of(model)(tokens)[0], 0.0))
    with deterministic(model), pytest.raises(GradInitError, match=r"counts 0\.0 items"):
        learner.step(pair)
