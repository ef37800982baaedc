"""Who begins at another learning rate than GradInit prepares for is told so, and nobody else."""

from __future__ import annotations

import copy
import functools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import train_here, usual_options
from fairseq.optim.lr_scheduler import LR_SCHEDULER_DATACLASS_REGISTRY
from fairseq.trainer import Trainer
from omegaconf import OmegaConf, open_dict
from test_options import configuration

from fairseq_gradinit.engine.blocks import Block
from fairseq_gradinit.plugin.options import PRESETS
from fairseq_gradinit.plugin.rate_advice import ask_scheduler, rate_warning
from fairseq_gradinit.plugin.trainer import drop_copies
from fairseq_gradinit.scales.file import Scales

# 128 x 512, 65,536 elements.
FC1 = Block("encoder.layers.0.fc1.weight", torch.nn.Parameter(torch.ones(512, 128)), "learned")
WIDE = Block("encoder.embed_tokens.weight", torch.nn.Parameter(torch.ones(9000, 128)), "learned")
# From this rate on FC1 wants a short warmup.
HIGH = 4e-3

WITHOUT = "use --warmup-updates 0"
LINEAR = "use --lr-scheduler polynomial_decay --warmup-updates 0"

# Schedules by name and settings, with the rate that the first update has. The peak is 2e-3.
SCHEDULES = [
    ("polynomial_decay", {}, 2e-3),
    ("polynomial_decay", {"warmup_updates": 1}, 0.0),
    ("polynomial_decay", {"warmup_updates": 4000}, 0.0),
    ("polynomial_decay", {"lr": [1e-3, 2e-3]}, 2e-3),
    ("inverse_sqrt", {}, 0.0),
    ("inverse_sqrt", {"warmup_init_lr": 1e-7}, 1e-7),
    ("cosine", {}, 2e-3),
    ("cosine", {"warmup_updates": 9, "warmup_init_lr": 1e-5}, 1e-5),
    ("fixed", {}, 2e-3),
    ("fixed", {"warmup_updates": 4000}, 5e-7),
    ("fixed", {"force_anneal": 1}, 2e-4),
    ("reduce_lr_on_plateau", {}, 2e-3),
    ("reduce_lr_on_plateau", {"warmup_updates": 9}, 0.0),
    ("tri_stage", {"phase_ratio": (0.1, 0.4, 0.5)}, 2e-5),
    ("tri_stage", {"phase_ratio": (0.0, 0.5, 0.5)}, 2e-3),
    ("triangular", {"lr": [1e-4], "max_lr": 2e-3}, 1e-4),
    ("manual", {"update2lr": "{'0': 2e-3, '5': 1e-3}", "epoch2lr": "{}"}, 2e-3),
    ("manual", {"update2lr": "{}", "epoch2lr": "{'1': 1e-3, '2': 2e-3}"}, 1e-3),
    ("step", {}, 2e-3),
    ("step", {"warmup_updates": 9, "warmup_init_lr": 1e-6}, 1e-6),
]
UPDATES = 2000


@functools.cache
def base(optimizer: str):
    return configuration("--max-update", str(UPDATES), "--cpu", "--optimizer", optimizer)


def run(schedule="polynomial_decay", *, lr=2e-3, optimizer="adam", updates=UPDATES, **settings):
    """The configuration of a run, as its trainer has it."""
    cfg = copy.deepcopy(base(optimizer))
    rates = lr if isinstance(lr, list) else [lr]
    settings = {"_name": schedule, "lr": rates, **settings}
    with open_dict(cfg):
        cfg.task.gradinit = False
        cfg.optimization.max_update = updates
        cfg.optimization.lr = cfg.optimizer.lr = rates
        if optimizer == "nag":
            cfg.optimizer.momentum = 0.9
        # The one that is written by hand has no dataclass.
        kind = LR_SCHEDULER_DATACLASS_REGISTRY.get(schedule, {})
        cfg.lr_scheduler = OmegaConf.merge(kind, settings)
    return cfg


def trainer_of(cfg) -> Trainer:
    task = SimpleNamespace(begin_epoch=lambda epoch, model: None)
    return Trainer(cfg, task, torch.nn.Linear(2, 2), torch.nn.Module())


def rates(trainer: Trainer) -> list[float]:
    """Of the first update, as fairseq's program comes to it, and of those after it."""
    found = []
    trainer.begin_epoch(1)
    for updates in range(1, 8):
        found.append(trainer.get_lr())
        trainer.set_num_updates(updates)
    return found


@pytest.mark.parametrize(("schedule", "settings", "first"), SCHEDULES, ids=str)
def test_the_scheduler_names_the_rate_of_the_first_update_and_is_as_before(
    schedule, settings, first
):
    trainer, never_asked = (trainer_of(run(schedule, **settings)) for _ in range(2))
    assert ask_scheduler(trainer).rate == pytest.approx(first)
    drop_copies(trainer)
    asked = rates(trainer)
    assert asked == rates(never_asked)
    assert asked[0] == pytest.approx(first)
    assert trainer.lr_scheduler.state_dict() == never_asked.lr_scheduler.state_dict()
    assert trainer.optimizer.state_dict() == never_asked.optimizer.state_dict()
    assert trainer.get_num_updates() == 7


def warning(schedule="polynomial_decay", *, blocks=(WIDE, FC1), eta=2e-3, **settings) -> str | None:
    cfg = run(schedule, **settings)
    return rate_warning(cfg, blocks, eta, ask_scheduler(trainer_of(cfg)))


@pytest.mark.parametrize(
    ("schedule", "settings", "found", "instead"),
    [
        ("polynomial_decay", {"warmup_updates": 1}, "0", WITHOUT),
        ("polynomial_decay", {"warmup_updates": 4000}, "0", WITHOUT),
        ("fixed", {"warmup_updates": 4000}, "5e-07", WITHOUT),
        ("inverse_sqrt", {}, "0", LINEAR),
        ("tri_stage", {"phase_ratio": (0.1, 0.4, 0.5)}, "2e-05", LINEAR),
    ],
    ids=str,
)
def test_a_warmup_left_on_by_habit_is_named_with_what_to_do(schedule, settings, found, instead):
    assert warning(schedule, **settings) == (
        f"the first update has learning rate {found}, and the scales are for 0.002: the step that "
        f"GradInit prepares is never taken; {instead}"
    )


def test_what_is_advised_brings_no_other_advice():
    assert warning(warmup_updates=1).endswith(WITHOUT)
    assert warning(warmup_updates=0) is None
    for warmup in (0, 1000):
        advice = warning(lr=HIGH, eta=HIGH, warmup_updates=warmup)
        assert advice.endswith(": --warmup-updates 140")
    assert warning(lr=HIGH, eta=HIGH, warmup_updates=140) is None


def test_a_rate_that_failed_is_named_with_a_warmup_that_was_enough():
    advice = warning(lr=HIGH, eta=HIGH)
    assert "--lr 0.004 times the square root of 65,536, the size of fc1, is 1.02" in advice
    assert advice.endswith(": --warmup-updates 140")
    endless = warning("fixed", lr=HIGH, updates=0)
    assert endless.endswith("some 7 % of training")


def test_a_rate_that_failed_for_a_wider_model_is_named():
    wide = Block(FC1.name, torch.nn.Parameter(torch.ones(1024, 512)), "learned")
    assert "is 0.72: at 0.7 and more" in warning(lr=1e-3, blocks=[wide])
    assert warning(lr=7e-4, blocks=[wide]) is None


@pytest.mark.parametrize(
    ("warmup", "enough"), [(1, True), (280, True), (281, False), (4000, False)]
)
def test_where_a_short_warmup_is_recommended_a_long_one_is_named(warmup, enough):
    found = warning(lr=HIGH, eta=HIGH, warmup_updates=warmup)
    if enough:
        assert found is None
    else:
        assert found.endswith("never taken; a short warmup is enough: --warmup-updates 140")


def test_high_rates_of_other_models_and_optimizers_are_left_alone():
    assert warning(lr=HIGH, eta=HIGH, blocks=[WIDE]) is None
    assert warning(lr=HIGH, eta=HIGH, optimizer="sgd") is None
    assert warning(lr=HIGH, eta=HIGH, optimizer="adadelta") is None


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 5e-4, "eta": PRESETS["paper"].eta},
        {"eta": 5.1e-4},
        {"eta": 7.9e-3},
        {"eta": 1.5e-2, "optimizer": "nag"},
        {"eta": math.nan},
        {"eta": math.nan, "warmup_updates": 500},
        {"eta": 2e-4, "schedule": "fixed", "warmup_updates": 10},
    ],
    ids=str,
)
def test_rates_that_are_close_or_not_known_are_left_alone(settings):
    assert warning(**settings) is None


@pytest.mark.parametrize(
    ("settings", "wanted", "found"),
    [
        ({"eta": 4.9e-4}, "0.00049", "0.002"),
        ({"eta": 8.1e-3}, "0.0081", "0.002"),
        ({"eta": 1.9e-2, "optimizer": "nag"}, "0.01", "0.0038"),
        ({"eta": 1e-3, "optimizer": "sgd", "lr": 0.0625}, "0.001", "0.0625"),
        ({"eta": 1e-5, "schedule": "fixed", "warmup_updates": 10}, "1e-05", "0.0002"),
    ],
    ids=str,
)
def test_a_trial_step_of_another_length_is_named(settings, wanted, found):
    advice = warning(**settings)
    assert f", and the scales are for {wanted}: learn them for the first update, " in advice
    assert advice.endswith(f"with --gradinit-eta {found}")


def test_the_log_has_the_warning_before_learning(corpus, tmp_path):
    base = [*usual_options("--warmup-updates"), "--warmup-updates", "9"]
    options = ["--max-update", "1", "--no-save", "--gradinit", "--gradinit-iterations", "1"]
    done = train_here(corpus.translation, tmp_path, *options, base=base)
    (line,) = done.lines("the first update has learning rate 0, and the scales are for 0.001: ")
    assert line.startswith("WARNING")
    assert done.output.index(line) < done.output.index("GradInit: learning the scales")


@pytest.mark.parametrize("settings", [{}, {"eta": "long"}, {"eta": "0.002"}])
def test_scales_from_a_file_say_what_they_are_for_or_nothing(settings):
    eta = Scales((), settings).eta
    assert eta == 0.002 if "0.002" in settings.values() else math.isnan(eta)
