"""A trial of several steps, held against training done by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny import central_differences, loss_of, make_model, make_pair, mean_loss

from fairseq_gradinit.blocks import collect_blocks
from fairseq_gradinit.config import GradInitConfig
from fairseq_gradinit.engine import BatchPair, ScaleLearner
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.quiet import quiet
from fairseq_gradinit.training_steps import TrainingSteps

ETA = 0.02
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, betas=(0.9, 0.98), weight_decay=0.01),
    "sgd": lambda p: torch.optim.SGD(p, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p),
}


def trial_of(steps: int) -> BatchPair:
    pairs = [make_pair(seed) for seed in range(steps)]
    return BatchPair(pairs[0].first, pairs[-1].second, [pair.first for pair in pairs[1:]])


def learner_for(model, optimizer="adam", **settings) -> ScaleLearner:
    config = GradInitConfig(**{"eta": ETA, "trial_steps": 3, "norm_gains": "learned", **settings})
    blocks = collect_blocks({"": model}, config.norm_gains)
    return ScaleLearner(blocks, loss_of(model), config, optimizer=OPTIMIZERS[optimizer])


def train(model, trial: BatchPair, optimizer: str, clip_norm: float = math.inf) -> list:
    """The displacement of the weights after each of the trial's steps, by a plain training loop."""
    trained = copy.deepcopy(model)
    start = [p.detach().clone() for p in trained.parameters()]
    made = OPTIMIZERS[optimizer](trained.parameters())
    made.param_groups[0]["lr"] = ETA
    moves = []
    for batches in (trial.first, *trial.between):
        made.zero_grad()
        mean_loss(trained, batches).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), clip_norm)
        made.step()
        moves.append([p.detach() - s for p, s in zip(trained.parameters(), start, strict=True)])
    return moves


def mean_loss_after(model, moves: list, trial: BatchPair) -> torch.Tensor:
    losses = []
    for move, batches in zip(moves, [*trial.between, trial.second], strict=True):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, m in zip(moved.parameters(), move, strict=True):
                p.add_(m)
        losses.append(mean_loss(moved, batches).detach())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("clip_norm", [math.inf, 0.05])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_objective_is_the_mean_loss_along_training(optimizer, clip_norm, steps):
    model = make_model()
    with quiet(model):
        learner = learner_for(model, optimizer, trial_steps=steps, clip_norm=clip_norm)
        trial = trial_of(steps)
        before = copy.deepcopy(model.state_dict())
        moves = train(model, trial, optimizer, clip_norm)
        found = learner.gradient(trial)
        assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())

        torch.testing.assert_close(found.trial_loss, mean_loss_after(model, moves, trial))
        expected = central_differences(learner, model, lambda: mean_loss_after(model, moves, trial))
        torch.testing.assert_close(found.by_scales, expected / ETA, rtol=1e-5, atol=1e-4)
        assert expected.abs().max() / ETA > 0.1


def test_clipping_changes_the_steps():
    """Else the test above would say nothing about it."""
    model = make_model()
    plain, clipped = (train(model, trial_of(2), "sgd", norm) for norm in (math.inf, 0.05))
    assert not torch.allclose(plain[-1][0], clipped[-1][0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_trial_begins_with_a_fresh_optimizer(optimizer):
    model = make_model()
    with quiet(model):
        learner = learner_for(model, optimizer)
        first, again = (learner.gradient(trial_of(3)) for _ in range(2))
        assert torch.equal(first.by_scales, again.by_scales)


def test_learning_lowers_the_mean_loss_of_the_trial():
    model = make_model()
    with quiet(model):
        learner = learner_for(model, lr=0.05)
        trial = trial_of(3)
        for _ in range(20):
            learner.step(trial)
        learner.flush()
        assert learner.history[-1].trial_loss < learner.history[0].trial_loss - 0.05
        scales = iter(learner.scales.tolist())
        fresh = dict(make_model().named_parameters())
        for block in learner.blocks:
            scale = next(scales) if block.learned else 1.0
            torch.testing.assert_close(block.parameter.detach(), fresh[block.name] * scale)


def test_a_loss_that_is_not_finite_on_the_way_skips_the_trial():
    model = make_model()

    def loss(batch):
        if isinstance(batch, str):
            return model.out.bias.sum() * torch.nan, 1.0
        return loss_of(model)(batch)

    config = GradInitConfig(eta=ETA, trial_steps=2)
    with quiet(model):
        blocks = collect_blocks({"": model}, config.norm_gains)
        learner = ScaleLearner(blocks, loss, config, optimizer=OPTIMIZERS["adam"])
        pair = make_pair()
        learner.step(BatchPair(pair.first, pair.second, [["spoiled"]]))
        learner.flush()
    assert (learner.skipped, len(learner.history)) == (1, 0)
    assert learner.scales.tolist() == [1.0] * len(learner.scales)
    fresh = dict(make_model().named_parameters())
    assert all(torch.equal(p, fresh[name]) for name, p in model.named_parameters())


def test_the_learning_rate_is_the_length_of_the_trial_steps():
    parameter = torch.nn.Parameter(torch.zeros(3))
    steps = TrainingSteps([parameter], lambda p: torch.optim.SGD(p, lr=99.0), 0.5)
    steps([torch.tensor([1.0, -2.0, 0.0])])
    assert parameter.tolist() == [-0.5, 1.0, 0.0]
    assert parameter.grad is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trial_steps": 0}, "trial-steps must be at least 1, not 0"),
        ({"trial_steps": 2, "through_step": True}, "through-step is for a trial of one step"),
    ],
)
def test_settings_that_make_no_trial_are_refused(settings, message):
    with pytest.raises(GradInitError, match=message):
        GradInitConfig(eta=ETA, **settings)


def test_several_steps_need_an_optimizer():
    model = make_model()
    config = GradInitConfig(eta=ETA, trial_steps=2)
    with pytest.raises(GradInitError, match="a trial of 2 steps needs the optimizer"):
        ScaleLearner(collect_blocks({"": model}, "fixed"), loss_of(model), config)
