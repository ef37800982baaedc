"""The numerics against independent truth: finite differences, and torch's own optimizers."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from tiny import (
    central_differences,
    gradients,
    in_ranks,
    loss_after,
    loss_of,
    make_learner,
    make_model,
    make_pair,
    move_away_from_one,
    step,
)
from torch import nn

from fairseq_gradinit.engine.batch_pairs import BatchPair
from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learner import Learned, ScaleLearner
from fairseq_gradinit.engine.learning import learn_scales
from fairseq_gradinit.engine.processes import OneProcess, Processes
from fairseq_gradinit.errors import GradInitError


@pytest.fixture
def model() -> nn.Module:
    return make_model()


@pytest.fixture
def pair() -> BatchPair:
    return make_pair()


@pytest.mark.parametrize("target", ["adam", "sgd", "sgd-normalized", "clipped"])
def test_objective_gradient_equals_central_differences(model, pair, target):
    settings = {"target": "sgd", "clip_norm": 0.1} if target == "clipped" else {"target": target}
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
def test_constraint_gradient_equals_central_differences(model, pair, target, order):
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
        kinds = [step(learner, pair).kind for _ in range(12)]
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
        scale_of = learner.learned().scale_of
        names = [name for name, _ in model.named_parameters()]
        for name, w, p in zip(names, initial, model.parameters(), strict=True):
            assert torch.equal(p, w * scale_of[name])
        assert all(p.grad is None for p in model.parameters())
        learner.weights.restore()
    assert all(map(torch.equal, initial, model.parameters()))


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


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"target": "adam"},
        {"target": "sgd", "gamma": 0.1, "second_order": "exact"},
        {"target": "adam", "gamma": 1.0, "second_order": "auto"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_ranks_learn_what_one_process_learns_with_all_micro_batches(ranks, settings):
    """Also from shares of different sizes, and when the third of three ranks has none."""
    rng = torch.Generator().manual_seed(7)
    sizes = [(4, 2, 3, 2, 5), (3, 2), (3, 2)]
    drawn = [[torch.randint(11, (n, 5), generator=rng) for n in size] for size in sizes]

    def work(processes: Processes) -> Learned:
        model = make_model()
        config = GradInitConfig(eta=0.05, iterations=3, norm_gains="learned", **settings)
        shares = [batches[processes.rank :: processes.count] for batches in drawn]
        pairs = [BatchPair(share, share[::-1]) for share in shares]
        with deterministic(model):
            blocks = collect_blocks({"": model}, config.norm_gains)
            return learn_scales(blocks, loss_of(model), pairs, config, processes=processes)

    together, alone = in_ranks(ranks, work), work(OneProcess())
    assert together == [together[0]] * ranks
    kind = "constraint" if "gamma" in settings else "objective"
    assert [iteration.kind for iteration in alone.history] == [kind] * 3
    # Finite differences magnify rounding.
    precision = 1e-5 if alone.second_order == "finite-difference" else 1e-9
    assert together[0].scale_of == pytest.approx(alone.scale_of, rel=precision)
    for found, expected in zip(together[0].history, alone.history, strict=True):
        for name, value in asdict(expected).items():
            if value is not None and name != "kind":
                value = pytest.approx(value, rel=precision)
            assert getattr(found, name) == value


def test_learning_lowers_the_loss_after_the_trial_step(model, pair):
    blocks = collect_blocks({"": model}, "fixed")
    config = GradInitConfig(eta=0.05, iterations=30)
    seen = []
    with deterministic(model):
        history = learn_scales(
            blocks, loss_of(model), [pair] * 30, config, on_iteration=seen.append
        ).history
    assert history[-1].trial_loss < history[0].trial_loss - 0.1
    assert [iteration.index for iteration in history] == list(range(1, 31))
    assert tuple(seen) == history


def test_batches_that_end_early_are_an_error(model, pair):
    initial = [p.detach().clone() for p in model.parameters()]
    blocks = collect_blocks({"": model}, "fixed")
    with deterministic(model), pytest.raises(GradInitError, match="ended after 2 of 5 iterations"):
        learn_scales(blocks, loss_of(model), [pair] * 2, GradInitConfig(eta=0.05, iterations=5))
    assert all(map(torch.equal, initial, model.parameters()))


def test_a_batch_that_counts_nothing_is_an_error(model, pair):
    blocks = collect_blocks({"": model}, "fixed")

    def loss(tokens):
        return loss_of(model)(tokens)[0], 0.0

    with deterministic(model), pytest.raises(GradInitError, match=r"counts 0\.0 items"):
        ScaleLearner(blocks, loss, GradInitConfig(eta=0.05)).step(pair)
