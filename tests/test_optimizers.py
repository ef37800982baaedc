"""The tables of first steps, held against fairseq's own optimizers taking one."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from fairseq.optim import OPTIMIZER_REGISTRY, build_optimizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_options import configuration, plan_of, refusal

from fairseq_gradinit.engine.config import TARGET_NAMES, GradInitConfig
from fairseq_gradinit.engine.trial_step import first_step
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.optimizers import (
    CHOICES,
    FIRST_STEPS,
    REFUSED,
    TrialStep,
    parse_betas,
    trial_step,
)

LR = 0.25
# Options of each optimizer that could bear upon its first step.
SETTINGS = {
    "adam": [
        [],
        ["--adam-betas", "(0.9, 0.98)"],
        ["--adam-betas", "0.5,0", "--use-old-adam"],
    ],
    "cpu_adam": [[], ["--adam-betas", "(0.7, 0.98)"]],
    "adamax": [
        [],
        ["--adamax-betas", "(0.8, 0.9)"],
        ["--adamax-betas", "(0.8, 0.9)", "--no-bias-correction"],
    ],
    "adagrad": [[]],
    "sgd": [[], ["--momentum", "0.9"]],
    "nag": [[], ["--momentum", "0"], ["--momentum", "0.5"]],
}
CASES = [(name, options) for name, each in SETTINGS.items() for options in each]


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch):
    """DeepSpeed's Adam kernel, so that fairseq's cpu_adam runs where it is not installed.

    Compared with the kernel of DeepSpeed 0.19.8 by hand: the same to 1e-7.
    """

    def adam_update(_, step, lr, beta1, beta2, eps, decay, correct, p, g, average, square):
        assert correct
        average.mul_(beta1).add_(g, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        size = square.sqrt() / math.sqrt(1 - beta2**step) + eps
        p.mul_(1 - lr * decay).addcdiv_(average, size, value=-lr / (1 - beta1**step))

    kernel = SimpleNamespace(create_adam=lambda *_: None, adam_update=adam_update)
    monkeypatch.setattr("fairseq.optim.cpu_adam.has_deepspeed", True)
    monkeypatch.setattr("fairseq.optim.cpu_adam._get_cpu_adam", lambda: kernel)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def optimizer_config(name: str, *options: str):
    return configuration("--optimizer", name, *options, "--lr", str(LR)).optimizer


def steps(config, gradient: torch.Tensor, count: int = 1, clip: float = 0.0, start=None):
    """How fairseq's optimizer moves a parameter, by a whole first step and those after it."""
    if start is None:
        start = torch.linspace(-1, 1, gradient.numel()).view_as(gradient)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = build_optimizer(config, [parameter])
    moves = []
    for _ in range(count):
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.clip_grad_norm(clip)
        optimizer.step()
        moves.append(parameter.detach() - before)
    return moves


def tried(step: TrialStep, gradient: torch.Tensor, clip_norm: float = math.inf) -> torch.Tensor:
    """The same step as GradInit's engine takes it."""
    config = GradInitConfig(LR * step.length, step.target, clip_norm)
    (direction,) = first_step([gradient], config)
    return -config.eta * direction


def assert_same(moved: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_every_optimizer_of_this_fairseq_is_either_known_or_refused():
    assert set(OPTIMIZER_REGISTRY) <= set(FIRST_STEPS) | set(REFUSED)
    assert not set(FIRST_STEPS) & set(REFUSED)
    assert set(SETTINGS) == set(FIRST_STEPS)


def test_every_step_of_the_engine_can_be_chosen():
    assert set(CHOICES) == {"auto", *TARGET_NAMES}


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_auto_is_the_first_step_of_the_optimizer(name, options):
    config = optimizer_config(name, *options)
    step = trial_step("auto", config)

    @settings(deadline=None, max_examples=20)
    @given(st.lists(st.floats(1e-2, 1e2) | st.floats(-1e2, -1e-2), min_size=1, max_size=6))
    def check(gradient):
        gradient = torch.tensor(gradient)
        assert_same(steps(config, gradient)[0], tried(step, gradient))

    check()


@pytest.mark.parametrize("name", ["sgd", "nag"])
def test_the_gradient_is_clipped_before_the_step(name):
    gradient = torch.tensor([3.0, -4.0])
    for clip in (0.0, 2.0, 10.0):
        plan = plan_of("--optimizer", name, "--clip-norm", str(clip))
        config = optimizer_config(name)
        expected = tried(trial_step("auto", config), gradient, plan.config.clip_norm)
        assert_same(steps(config, gradient, clip=clip)[0], expected)


@pytest.mark.parametrize("betas", ["0.9", "None", "(0.9, 1)", "(0.9, 0.9, 0.9)"])
def test_betas_that_are_not_two_numbers_are_refused(betas):
    adamax = ("--optimizer", "adamax", "--no-bias-correction")
    message = refusal(*adamax, "--adamax-betas", betas)
    assert message.startswith("--adamax-betas ")
    assert "two numbers" in message


@pytest.mark.parametrize(("name", "reason"), REFUSED.items(), ids=list(REFUSED))
def test_a_refusal_says_why_and_what_to_do(name, reason):
    message = refusal("--optimizer", name)
    assert message == (
        f"GradInit does not know the first step of --optimizer {name} by itself: {reason}; "
        "name the closest of its own with --gradinit-optimizer {adam,sgd,sgd-normalized}"
    )
    for target in TARGET_NAMES:
        config = plan_of("--optimizer", name, "--gradinit-optimizer", target).config
        assert (config.target, config.eta) == (target, pytest.approx(0.002))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(GradInitError, match="first step of --optimizer lion by itself; name the"):
        trial_step("auto", SimpleNamespace(_name="lion"))


def test_adadelta_lies_between_sgd_and_a_small_step_of_adam_that_grows():
    # sqrt(eps) is 1e-3, and its square root over 1 - rho the first step's bound.
    config = optimizer_config("adadelta")
    small = torch.tensor([1e-5, -3e-5])
    (move,) = steps(config, small, start=torch.zeros(2))
    torch.testing.assert_close(move, -LR * small, rtol=1e-3, atol=0.0)
    large = torch.tensor([5.0, -0.3])
    moves = steps(config, large, count=400, start=torch.zeros(2))
    torch.testing.assert_close(moves[0], -LR * 10**-2.5 * large.sign(), rtol=1e-3, atol=0.0)
    assert (moves[-1].abs() > 2 * moves[0].abs()).all()


def test_adafactor_takes_averages_over_rows_and_columns():
    gradient = torch.tensor([[1.0, 2.0], [3.0, -20.0]])
    config = optimizer_config("adafactor")
    (move,) = steps(config, gradient)
    assert not torch.allclose(move.abs(), move.abs()[0, 0].expand(2, 2), rtol=0.1)
    config = optimizer_config("adafactor", "--scale-parameter")
    weights = torch.ones(2, 2)
    (small,), (large,) = (steps(config, gradient, start=size * weights) for size in (1, 3))
    torch.testing.assert_close(large, 3 * small)


@given(st.text(max_size=12) | st.floats().map(str) | st.tuples(st.floats(), st.floats()).map(str))
def test_betas_are_two_numbers_or_an_error(text):
    try:
        first, second = parse_betas("--gradinit-betas", text)
    except GradInitError:
        return
    assert isinstance(first, float)
    assert isinstance(second, float)
