"""From a command line to a plan: what the options mean, and which of them are refused."""

from __future__ import annotations

import math
import pickle
import sys
from argparse import Namespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_gradinit.config import GradInitConfig
from fairseq_gradinit.errors import GradInitError

COMMAND = ["data", "--arch", "transformer", "--max-tokens", "400", "--lr", "0.002"]


def configuration(*options: str, gradinit: bool = True):
    """What fairseq-train makes of a command line."""
    from fairseq import options as fairseq_options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import fairseq_gradinit.plugin  # noqa: F401

    arguments = [*COMMAND, *(["--gradinit"] if gradinit else []), *options]
    if "--optimizer" not in options:
        arguments += ["--optimizer", "adam"]
    before, sys.argv = sys.argv, ["fairseq-train", *arguments]
    try:
        parser = fairseq_options.get_training_parser()
        return convert_namespace_to_omegaconf(fairseq_options.parse_args_and_arch(parser))
    finally:
        sys.argv = before


def plan_of(*options: str):
    from fairseq_gradinit.options import make_plan

    return make_plan(configuration(*options))


def refusal(*options: str, gradinit: bool = True) -> str:
    from fairseq_gradinit.options import make_plan

    cfg = configuration(*options, gradinit=gradinit)
    with pytest.raises(GradInitError) as error:
        make_plan(cfg)
    return str(error.value)


def test_the_default_preset():
    plan = plan_of()
    assert plan.config == GradInitConfig(
        eta=3 * 0.002,
        target="adam",
        gamma=math.inf,
        iterations=120,
        lr=1e-2,
        betas=(0.9, 0.98),
        min_scale=0.2,
        min_bias_scale=0.2,
        max_scale=5.0,
        norm_gains="fixed",
    )
    assert (plan.max_tokens, plan.max_sentences, plan.micro_batches) == (600, None, 1)
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
    )
    assert plan.max_tokens == 6000


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
    }
    options = []
    for name, value in values.items():
        text = ",".join(map(str, value)) if name == "betas" else str(value)
        options += ["--gradinit-" + name.replace("_", "-"), text]
    plan = plan_of("--gradinit-preset", "paper", "--gradinit-max-tokens", "99", *options)
    assert plan.config == GradInitConfig(**values)
    assert plan.max_tokens == 99
    assert not plan_of("--gradinit-preset", "paper", "--gradinit-gamma", "inf").config.constrained


@pytest.mark.parametrize(
    ("options", "target"),
    [
        (["--optimizer", "adamax"], "adam"),
        (["--optimizer", "adagrad"], "adam"),
        (["--optimizer", "sgd"], "sgd"),
        (["--optimizer", "nag", "--gradinit-optimizer", "sgd-normalized"], "sgd-normalized"),
        (["--optimizer", "adam", "--gradinit-optimizer", "sgd"], "sgd"),
    ],
)
def test_the_trial_step_is_that_of_the_optimizer(options, target):
    config = plan_of(*options).config
    assert config.target == target
    assert config.norm_order == (1 if target == "adam" else 2)


@pytest.mark.parametrize("optimizer", ["adadelta", "adafactor", "lamb", "nag"])
def test_an_optimizer_whose_first_step_is_unknown_is_refused(optimizer):
    from fairseq.optim import OPTIMIZER_REGISTRY

    if optimizer not in OPTIMIZER_REGISTRY:
        pytest.skip(f"this fairseq has no {optimizer}")
    message = refusal("--optimizer", optimizer)
    assert f"does not know the first step of --optimizer {optimizer}" in message
    assert "--gradinit-optimizer {adam,sgd,sgd-normalized}" in message


def test_batches_follow_those_of_training():
    plan = plan_of("--batch-size", "11", "--update-freq", "4")
    assert (plan.max_tokens, plan.max_sentences, plan.micro_batches) == (600, 17, 4)


def test_eta_follows_the_peak_of_the_schedule():
    assert plan_of("--lr", "0.1,0.4,0.2").config.eta == pytest.approx(1.2)
    triangular = ["--lr", "0.1", "--lr-scheduler", "triangular", "--max-lr", "0.7"]
    assert plan_of(*triangular).config.eta == pytest.approx(2.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gradinit-gamma", "0"], "gamma must be a number greater than 0, or inf"),
        (["--gradinit-gamma", "-5"], "gamma must be"),
        (["--gradinit-eta", "0"], "eta must be a number greater than 0"),
        (["--gradinit-eta", "nan"], "eta must be"),
        (["--lr", "0"], "eta must be"),
        (["--gradinit-iterations", "0"], "iterations must be at least 1"),
        (["--gradinit-iterations", "-3"], "iterations must be at least 1"),
        (["--gradinit-lr", "0"], "lr must be"),
        (["--gradinit-min-scale", "3", "--gradinit-max-scale", "2"], "min-scale must lie in"),
        (["--gradinit-max-scale", "0.5"], "max-scale must be a finite number of at least 1"),
        (["--gradinit-max-tokens", "2"], "too few to cut a batch in thirds"),
        (["--gradinit-betas", "0.9"], "'0.9' is not two numbers with a comma"),
        (["--gradinit-betas", "0.9,1"], "betas must be two numbers in"),
        (["--ddp-backend", "fully_sharded"], "does not work with --ddp-backend fully_sharded"),
        (["--ddp-backend", "slowmo"], "does not work with --ddp-backend slowmo"),
        (["--use-bmuf"], "does not work with --use-bmuf"),
        (["--bf16"], "does not work with --tpu or --bf16"),
        (["--pipeline-model-parallel"], "does not work with --pipeline-model-parallel"),
        (["--model-parallel-size", "2"], "does not work with --model-parallel-size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused(options, message):
    assert message in refusal(*options)


@pytest.mark.parametrize(
    "option",
    [
        ["--gradinit-iterations", "5"],
        ["--gradinit-preset", "paper"],
        ["--gradinit-optimizer", "sgd"],
        ["--gradinit-scales", "s.json"],
        ["--gradinit-gamma", "inf"],
    ],
    ids=" ".join,
)
def test_an_option_without_gradinit_is_refused(option):
    message = refusal(*option, gradinit=False)
    assert message.startswith(f"{option[0]} was given without --gradinit")


def test_without_options_there_is_no_plan():
    from fairseq_gradinit.options import make_plan

    assert make_plan(configuration(gradinit=False)) is None
    assert make_plan(Namespace(path="some other program's")) is None


@given(st.text(max_size=12) | st.floats().map(str) | st.tuples(st.floats(), st.floats()).map(str))
def test_betas_are_two_numbers_or_a_sentence(text):
    from fairseq_gradinit.options import _parse_betas

    try:
        first, second = _parse_betas(text)
    except GradInitError:
        return
    assert isinstance(first, float)
    assert isinstance(second, float)


@pytest.mark.parametrize("task", ["translation", "language_modeling", "multilingual_translation"])
def test_a_configuration_with_the_options_can_be_sent_to_other_processes(task):
    """fairseq sends it to one process for each GPU."""
    more = ["--lang-pairs", "de-en"] if task == "multilingual_translation" else []
    arch = {"language_modeling": "transformer_lm"}.get(task, "transformer")
    cfg = configuration("--task", task, "--arch", arch, *more, "--gradinit-iterations", "9")
    task_cfg = pickle.loads(pickle.dumps(cfg)).task
    assert task_cfg.gradinit is True
    assert task_cfg.gradinit_iterations == 9


def test_every_task_has_the_options():
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    import fairseq_gradinit.plugin  # noqa: F401
    from fairseq_gradinit.options import OPTION_NAMES

    assert {"translation", "language_modeling", "masked_lm"} <= TASK_DATACLASS_REGISTRY.keys()
    for name, dataclass in TASK_DATACLASS_REGISTRY.items():
        assert set(OPTION_NAMES) <= dataclass.__dataclass_fields__.keys(), name
