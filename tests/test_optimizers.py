"""The table of first steps, held against fairseq's own optimizers taking one."""

from __future__ import annotations

import pytest
import torch
from fairseq.optim import build_optimizer
from test_options import configuration, plan_of, refusal

from fairseq_gradinit.engine.config import TARGET_NAMES
from fairseq_gradinit.engine.trial_step import first_step

GRADIENT = torch.tensor([3.0, -4.0, 0.02, -50.0])
# With options that could bear upon the first step.
COMMANDS = [
    "--optimizer adam --adam-betas 0.5,0 --use-old-adam",
    "--optimizer adamax --adamax-betas 0.8,0.9",
    "--optimizer adamax --adamax-betas 0.8,0.9 --no-bias-correction",
    "--optimizer adagrad",
    "--optimizer sgd --momentum 0.9",
    "--optimizer sgd --clip-norm 2",
    "--optimizer nag --momentum 0.5",
    "--optimizer nag --clip-norm 2",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_auto_is_the_first_step_of_the_optimizer(command):
    cfg = configuration(*command.split(), "--lr", "0.25")
    start = torch.linspace(-1, 1, len(GRADIENT))
    parameter = torch.nn.Parameter(start.clone())
    optimizer = build_optimizer(cfg.optimizer, [parameter])
    parameter.grad = GRADIENT.clone()
    optimizer.clip_grad_norm(cfg.optimization.clip_norm)
    optimizer.step()
    config = plan_of(*command.split(), "--lr", "0.25").config
    (direction,) = first_step([GRADIENT], config)
    moved = parameter.detach() - start
    torch.testing.assert_close(moved, -config.eta * direction, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adadelta", "adafactor", "lamb", "composite"])
def test_for_another_optimizer_a_step_is_to_be_chosen(name):
    assert refusal("--optimizer", name) == (
        f"GradInit does not know the first step of --optimizer {name} by itself; name the closest "
        "of its own with --gradinit-optimizer {adam,sgd,sgd-normalized}"
    )
    for target in TARGET_NAMES:
        config = plan_of("--optimizer", name, "--gradinit-optimizer", target).config
        assert (config.target, config.eta) == (target, pytest.approx(0.002))
