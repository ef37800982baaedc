"""Who begins at another learning rate than GradInit prepares for is told so, and nobody else."""

from __future__ import annotations

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from fairseq.optim.lr_scheduler import LR_SCHEDULER_DATACLASS_REGISTRY
from fairseq.trainer import Trainer
from omegaconf import OmegaConf, open_dict
from test_options import configuration

from fairseq_gradinit.engine.blocks import Block
from fairseq_gradinit.plugin.options import PRESETS
from fairseq_gradinit.plugin.rate_advice import ask_scheduler, rate_warning

# 128 x 512, 65,536 elements.
FC1 = Block("encoder.layers.0.fc1.weight", torch.nn.Parameter(torch.ones(512, 128)), "learned")
EMBEDDING = Block("encoder.embed_tokens.weight", torch.nn.Parameter(torch.ones(9, 128)), "learned")
# From this rate on FC1 wants a short warmup.
HIGH = 4e-3


@functools.cache
def base(optimizer: str):
    return configuration("--max-update", "2000", "--cpu", "--optimizer", optimizer)


def run(schedule="polynomial_decay", *, lr=2e-3, optimizer="adam", updates=2000, **settings):
    """The configuration of a run, as its trainer has it."""
    cfg = copy.deepcopy(base(optimizer))
    settings = {"_name": schedule, "lr": [lr], **settings}
    with open_dict(cfg):
        cfg.task.gradinit = False
        cfg.optimization.max_update = updates
        cfg.optimization.lr = cfg.optimizer.lr = [lr]
        if optimizer == "nag":
            cfg.optimizer.momentum = 0.9
        cfg.lr_scheduler = OmegaConf.merge(LR_SCHEDULER_DATACLASS_REGISTRY[schedule], settings)
    return cfg


def trainer_of(cfg) -> Trainer:
    return Trainer(cfg, SimpleNamespace(), torch.nn.Linear(2, 2), torch.nn.Module())


@pytest.mark.parametrize(
    ("schedule", "settings", "first"),
    [
        ("polynomial_decay", {}, 2e-3),
        ("polynomial_decay", {"warmup_updates": 4000}, 0.0),
        ("inverse_sqrt", {"warmup_init_lr": 1e-7}, 1e-7),
        ("cosine", {"warmup_updates": 9, "warmup_init_lr": 1e-5}, 1e-5),
        ("fixed", {"force_anneal": 1}, 2e-4),
        ("reduce_lr_on_plateau", {"warmup_updates": 9}, 0.0),
        ("tri_stage", {"phase_ratio": (0.1, 0.4, 0.5)}, 2e-5),
        ("triangular", {"lr": 1e-4, "max_lr": 2e-3}, 1e-4),
        ("step", {}, 2e-3),
    ],
    ids=str,
)
def test_the_scheduler_names_the_rate_of_the_first_update(schedule, settings, first):
    assert ask_scheduler(trainer_of(run(schedule, **settings))).rate == pytest.approx(first)


def warning(schedule="polynomial_decay", *, blocks=(EMBEDDING, FC1), eta=2e-3, **settings):
    cfg = run(schedule, **settings)
    return rate_warning(cfg, blocks, eta, ask_scheduler(trainer_of(cfg)))


def test_a_warmup_left_on_by_habit_is_named_with_what_to_do():
    for schedule, settings in (("polynomial_decay", {"warmup_updates": 1}), ("inverse_sqrt", {})):
        assert warning(schedule, **settings) == (
            "the first update has learning rate 0, and the scales are for 0.002: the step that "
            "GradInit prepares is never taken; "
            "use --lr-scheduler polynomial_decay --warmup-updates 0"
        )
    assert warning(warmup_updates=0) is None


def test_a_rate_that_failed_is_named_with_a_warmup_that_was_enough():
    advice = warning(lr=HIGH, eta=HIGH)
    assert "--lr 0.004 times the square root of 65,536, the size of fc1, is 1.02" in advice
    assert advice.endswith(": --warmup-updates 140")
    assert warning("fixed", lr=HIGH, updates=0).endswith("some 7 % of training")
    assert warning(lr=HIGH, eta=HIGH, warmup_updates=280) is None
    long = warning(lr=HIGH, eta=HIGH, warmup_updates=281)
    assert long.endswith("never taken; a short warmup is enough: --warmup-updates 140")


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 5e-4, "eta": PRESETS["paper"].eta},
        {"eta": 5.1e-4},
        {"eta": 7.9e-3},
        {"eta": 1.5e-2, "optimizer": "nag"},
        {"eta": math.nan, "warmup_updates": 500},
        {"lr": HIGH, "eta": HIGH, "blocks": [EMBEDDING]},
        {"lr": HIGH, "eta": HIGH, "optimizer": "sgd"},
    ],
    ids=str,
)
def test_rates_that_are_close_or_not_known_or_of_other_models_are_left_alone(settings):
    assert warning(**settings) is None


@pytest.mark.parametrize(
    ("settings", "wanted", "found"),
    [
        ({"eta": 4.9e-4}, "0.00049", "0.002"),
        ({"eta": 1.9e-2, "optimizer": "nag"}, "0.01", "0.0038"),
        ({"eta": 1e-5, "schedule": "fixed", "warmup_updates": 10}, "1e-05", "0.0002"),
    ],
    ids=str,
)
def test_a_trial_step_of_another_length_is_named(settings, wanted, found):
    advice = warning(**settings)
    assert f", and the scales are for {wanted}: learn them for the first update, " in advice
    assert advice.endswith(f"with --gradinit-eta {found}")
