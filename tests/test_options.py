"""From a command line to a plan: what the options mean, and which of them are refused."""

from __future__ import annotations

import math
import pickle
import sys
from argparse import Namespace
from unittest import mock

import pytest
from fairseq import options as fairseq_options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import DictConfig

import fairseq_gradinit.plugin.install  # noqa: F401
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.plan import Plan, make_plan
from fairseq_gradinit.plugin.trainer import settings_digest

COMMAND = ["data", "--arch", "transformer", "--max-tokens", "400", "--lr", "0.002"]


def parsed(*options: str) -> Namespace:
    """What fairseq-train's parser makes of a command line."""
    with mock.patch.object(sys, "argv", ["fairseq-train", *COMMAND, *options]):
        return fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser())


def configuration(*options: str, gradinit: bool = True) -> DictConfig:
    """What fairseq-train makes of a command line."""
    words = ["--optimizer", "adam", *options, *(["--gradinit"] if gradinit else [])]
    return convert_namespace_to_omegaconf(parsed(*words))


def plan_of(*options: str) -> Plan | None:
    return make_plan(configuration(*options))


def refusal(*options: str, gradinit: bool = True) -> str:
    cfg = configuration(*options, gradinit=gradinit)
    with pytest.raises(GradInitError) as error:
        make_plan(cfg)
    return str(error.value)


def test_the_default_preset():
    plan = plan_of()
    assert plan.config == GradInitConfig(eta=0.002, seed=1)
    assert plan.save_interval == 10
    assert (plan.max_tokens, plan.max_sentences, plan.micro_batches) == (600, None, 1)
    batches = plan_of("--batch-size", "11", "--update-freq", "4")
    assert (batches.max_tokens, batches.max_sentences, batches.micro_batches) == (600, 17, 4)
    assert (plan.centering, plan.encoder_branches, plan.require_encoder) == (True, 0.1, False)
    assert plan.scales_file is None


def test_the_preset_of_the_paper():
    plan = plan_of("--gradinit-preset", "paper")
    assert plan.config == GradInitConfig(
        eta=1e-3,
        target="adam",
        gamma=1000.0,
        iterations=780,
        lr=2.5e-3,
        betas=(0.9, 0.98),
        min_scale=0.01,
        min_bias_scale=0.0,
        max_scale=100.0,
        norm_gains="learned",
        second_order="exact",
        seed=1,
    )
    assert (plan.max_tokens, plan.centering, plan.encoder_branches) == (6000, False, 1.0)


def test_every_option_overrides_its_preset():
    values = {
        "iterations": 7,
        "lr": 0.5,
        "betas": (0.1, 0.2),
        "eta": 0.3,
        "gamma": 4.0,
        "min_scale": 0.4,
        "min_bias_scale": 0.0,
        "max_scale": 6.0,
        "norm_gains": "fixed",
        "second_order": "finite-difference",
        "precision": "bf16",
    }
    options = []
    for name, value in values.items():
        text = ",".join(map(str, value)) if name == "betas" else str(value)
        options += ["--gradinit-" + name.replace("_", "-"), text]
    options += ["--gradinit-save-interval", "0", "--seed", "17", "--gradinit-optimizer", "sgd"]
    plan = plan_of("--gradinit-preset", "paper", "--gradinit-max-tokens", "99", *options)
    assert plan.config == GradInitConfig(**values, target="sgd", seed=17)
    assert (plan.max_tokens, plan.save_interval) == (99, 0)
    assert not plan_of("--gradinit-preset", "paper", "--gradinit-gamma", "inf").config.constrained


@pytest.mark.parametrize(
    ("options", "target", "eta", "clip_norm"),
    [
        ("--optimizer adamax --clip-norm 0.1", "adam", 0.002, math.inf),
        ("--optimizer sgd --momentum 0.8 --clip-norm 0.1", "sgd", 0.002, 0.1),
        ("--optimizer nag --momentum 0.8", "sgd", 0.002 * 1.8, math.inf),
        ("--optimizer nag --momentum 0.8 --gradinit-eta 0.5", "sgd", 0.5, math.inf),
        ("--optimizer nag --gradinit-optimizer sgd", "sgd", 0.002, math.inf),
        ("--gradinit-optimizer sgd-normalized --clip-norm 1", "sgd-normalized", 0.002, math.inf),
        ("--lr 0.1,0.4,0.2", "adam", 0.4, math.inf),
        ("--lr-scheduler triangular --max-lr 0.7", "adam", 0.7, math.inf),
    ],
)
def test_the_trial_step_is_that_of_the_optimizer_at_its_peak(options, target, eta, clip_norm):
    config = plan_of(*options.split()).config
    assert (config.target, config.clip_norm) == (target, clip_norm)
    assert config.eta == pytest.approx(eta)


def test_scales_from_a_file_go_with_any_optimizer():
    """And the file says whether to center unless the option does."""
    file = ["--gradinit-scales", "s.json"]
    plan = plan_of(*file, "--optimizer", "adadelta")
    assert (plan.scales_file, plan.centering) == ("s.json", None)
    assert plan_of(*file, "--gradinit-centering", "on").centering is True
    assert plan_of(*file, "--gradinit-centering", "off").centering is False


@pytest.mark.parametrize(
    ("usual", "heads"),
    [
        ("--arch transformer", "--encoder-attention-heads"),
        # This one has a dataclass for its settings.
        ("--task language_modeling --arch transformer_lm", "--decoder-attention-heads"),
    ],
)
def test_a_digest_of_settings_tells_those_of_model_and_criterion(usual, heads):
    usual = [*usual.split(), "--criterion", "label_smoothed_cross_entropy"]

    def digests(*options: str) -> tuple[str, str]:
        cfg = configuration(*usual, *options)
        return settings_digest(cfg, "model"), settings_digest(cfg, "criterion")

    model, criterion = digests()
    assert digests("--save-dir", "other", "--max-update", "9", "--lr", "1") == (model, criterion)
    found = digests(heads, "4")
    assert (found[0] == model, found[1]) == (False, criterion)
    assert digests("--label-smoothing", "0.3")[1] != criterion


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gradinit-gamma 0", "gamma must be a number greater than 0, or inf"),
        ("--lr 0", "eta must be a number greater than 0, not 0.0"),
        ("--gradinit-encoder-branches 0", "--gradinit-encoder-branches must be a number greater"),
        ("--gradinit-betas 0.9", "--gradinit-betas '0.9' is not two numbers with a comma"),
        ("--ddp-backend fully_sharded", "does not work with --ddp-backend fully_sharded: each pro"),
        ("--model-parallel-size 2", "does not work with --model-parallel-size above 1: each proc"),
        ("--bf16", "does not work with --tpu or --bf16"),
    ],
)
def test_values_and_runs_that_cannot_work_are_refused(options, message):
    assert message in refusal(*options.split())


@pytest.mark.parametrize("option", ["--gradinit-preset paper", "--gradinit-scales s.json"])
def test_an_option_without_gradinit_is_refused(option):
    flag, value = option.split()
    message = refusal(flag, value, gradinit=False)
    assert message.startswith(f"{flag} was given without --gradinit")
    assert make_plan(configuration(gradinit=False)) is None
    assert make_plan(Namespace(path="some other program's")) is None


@pytest.mark.parametrize(
    "task", ["translation", "multilingual_translation --lang-pairs de-en --arch transformer"]
)
def test_a_configuration_with_the_options_can_be_sent_to_other_processes(task):
    """fairseq sends it to one process for each GPU."""
    cfg = configuration("--task", *task.split(), "--gradinit-iterations", "9")
    task_cfg = pickle.loads(pickle.dumps(cfg)).task
    assert (task_cfg.gradinit, task_cfg.gradinit_iterations) == (True, 9)
