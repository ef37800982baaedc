"""From a command line to a plan: what the options mean, and which of them are refused."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
import sys
from argparse import ArgumentParser, Namespace
from types import SimpleNamespace
from unittest import mock

import pytest
from fairseq import options as fairseq_options
from fairseq import tasks
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, gen_parser_from_dataclass
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from fairseq.tasks.translation import TranslationConfig
from omegaconf import DictConfig, OmegaConf, flag_override

import fairseq_gradinit.plugin.install  # noqa: F401
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.options import OPTION_NAMES, GradInitOptions
from fairseq_gradinit.plugin.phase import describe
from fairseq_gradinit.plugin.plan import Plan, make_plan
from fairseq_gradinit.plugin.trainer import settings_digest

COMMAND = ["data", "--arch", "transformer", "--max-tokens", "400", "--lr", "0.002"]


def parsed(*options: str) -> Namespace:
    """What fairseq-train's parser makes of a command line."""
    with mock.patch.object(sys, "argv", ["fairseq-train", *COMMAND, *options]):
        return fairseq_options.parse_args_and_arch(fairseq_options.get_training_parser())


@functools.cache
def converted(*options: str) -> tuple[Namespace, DictConfig]:
    args = parsed(*options)
    return args, convert_namespace_to_omegaconf(args)


def configuration(*options: str, gradinit: bool = True) -> DictConfig:
    """What fairseq-train makes of a command line.

    fairseq's conversion takes half a second. It is done once for each choice of classes, and the
    other values are put in their places afterwards.
    """
    args = parsed("--optimizer", "adam", *options, *(["--gradinit"] if gradinit else []))
    chosen = ("task", "arch", "optimizer", "lr_scheduler", "criterion")
    choice = [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in chosen]
    required = ("--max-lr", "1") if args.lr_scheduler == "triangular" else ()
    usual, base = converted(*itertools.chain(*choice), *required)
    cfg = copy.deepcopy(base)
    changed = {key: value for key, value in vars(args).items() if value != vars(usual).get(key)}
    with flag_override(cfg, ["struct", "allow_objects"], [False, True]):
        for name, group in cfg.items():
            if isinstance(group, Namespace):
                cfg[name] = Namespace(**{**vars(group), **changed})
            elif group is not None:
                group.update({key: changed[key] for key in changed.keys() & group.keys()})
    return cfg


def plan_of(*options: str) -> Plan | None:
    return make_plan(configuration(*options))


def refusal(*options: str, gradinit: bool = True) -> str:
    cfg = configuration(*options, gradinit=gradinit)
    with pytest.raises(GradInitError) as error:
        make_plan(cfg)
    return str(error.value)


def test_the_default_preset():
    plan = plan_of()
    assert plan.config == GradInitConfig(
        eta=0.002,
        target="adam",
        gamma=math.inf,
        iterations=60,
        lr=1e-2,
        betas=(0.9, 0.98),
        min_scale=0.2,
        min_bias_scale=0.2,
        max_scale=5.0,
        norm_gains="fixed",
        second_order="auto",
        precision="fp32",
        max_skipped=10,
        seed=1,
    )
    assert plan.save_interval == 10
    assert (plan.max_tokens, plan.max_sentences, plan.micro_batches) == (600, None, 1)
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


def test_a_scales_file_says_whether_to_center_unless_the_option_does():
    file = ["--gradinit-scales", "scales.json"]
    assert plan_of(*file).centering is None
    assert plan_of(*file, "--gradinit-centering", "on").centering is True
    assert plan_of(*file, "--gradinit-centering", "off").centering is False


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
        "max_skipped": 0,
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


@pytest.mark.parametrize(
    ("options", "eta"),
    [
        (["--optimizer", "nag", "--momentum", "0.8"], 0.002 * 1.8),
        (["--optimizer", "nag", "--momentum", "0.8", "--gradinit-eta", "0.5"], 0.5),
        (["--optimizer", "nag", "--gradinit-preset", "paper"], 1e-3),
        (["--optimizer", "nag", "--gradinit-optimizer", "sgd"], 0.002),
        (["--optimizer", "sgd", "--momentum", "0.8"], 0.002),
        (["--optimizer", "adamax", "--no-bias-correction"], 0.002 * 0.1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_only_the_automatic_eta_follows_the_length_of_the_first_step(options, eta):
    assert plan_of(*options).config.eta == pytest.approx(eta)


@pytest.mark.parametrize(
    ("options", "clip_norm"),
    [
        (["--optimizer", "sgd"], math.inf),
        (["--optimizer", "sgd", "--clip-norm", "0"], math.inf),
        (["--optimizer", "sgd", "--clip-norm", "-1"], math.inf),
        (["--optimizer", "sgd", "--clip-norm", "0.1"], 0.1),
        (["--optimizer", "nag", "--clip-norm", "0.1"], 0.1),
        (["--clip-norm", "0.1", "--gradinit-optimizer", "sgd"], 0.1),
        (["--clip-norm", "0.1"], math.inf),
        (["--clip-norm", "0.1", "--gradinit-optimizer", "sgd-normalized"], math.inf),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_trial_step_is_clipped_as_in_training_where_that_changes_it(options, clip_norm):
    assert plan_of(*options).config.clip_norm == clip_norm


def test_scales_from_a_file_go_with_any_optimizer():
    for optimizer in ("adadelta", "composite"):
        plan = plan_of("--optimizer", optimizer, "--gradinit-scales", "s.json")
        assert plan.scales_file == "s.json"


def test_bf16_in_gradinit_goes_with_fp16_in_training():
    plan = plan_of("--fp16", "--gradinit-precision", "bf16")
    assert plan.config.precision == "bf16"


def test_batches_follow_those_of_training():
    plan = plan_of("--batch-size", "11", "--update-freq", "4")
    assert (plan.max_tokens, plan.max_sentences, plan.micro_batches) == (600, 17, 4)


def test_eta_follows_the_peak_of_the_schedule():
    assert plan_of("--lr", "0.1,0.4,0.2").config.eta == pytest.approx(0.4)
    triangular = ["--lr", "0.1", "--lr-scheduler", "triangular", "--max-lr", "0.7"]
    assert plan_of(*triangular).config.eta == pytest.approx(0.7)


def test_eta_follows_the_highest_rate_of_a_schedule_written_by_hand():
    manual = ["--lr", "0.1", "--lr-scheduler", "manual"]
    assert plan_of(*manual).config.eta == pytest.approx(0.1)
    both = [*manual, "--epoch2lr", "{'1-3': 2e-3, '4': 1e-3}", "--update2lr", "{'50': 3e-3}"]
    assert plan_of(*both).config.eta == pytest.approx(3e-3)
    message = refusal(*manual, "--epoch2lr", "1e-3")
    assert message.startswith("--epoch2lr '1e-3' is no dictionary of learning rates, such as ")


def test_options_for_learning_are_unused_beside_scales_from_a_file():
    learning = {
        "--gradinit-optimizer": "sgd",
        "--gradinit-iterations": "5",
        "--gradinit-encoder-branches": "1",
        "--gradinit-second-order": "exact",
        "--gradinit-precision": "bf16",
        "--gradinit-save-interval": "0",
    }
    words = [word for option in learning.items() for word in option]
    assert plan_of(*words).unused == ()
    usual = ["--gradinit-scales", "s.json", "--gradinit-centering", "off"]
    assert plan_of(*usual, "--gradinit-max-tokens", "300").unused == ()
    assert plan_of(*usual, *words).unused == tuple(learning)


def test_a_digest_of_settings_tells_those_of_model_and_criterion():
    usual = ["--arch", "transformer", "--criterion", "label_smoothed_cross_entropy"]

    def digests(*options: str) -> tuple[str, str]:
        cfg = configuration(*usual, *options)
        return settings_digest(cfg, "model"), settings_digest(cfg, "criterion")

    model, criterion = digests()
    assert digests() == (model, criterion)
    elsewhere = ["--save-dir", "other", "--log-interval", "3", "--max-update", "9", "--lr", "1"]
    assert digests(*elsewhere, "--distributed-port", "1") == (model, criterion)
    for options in (["--encoder-attention-heads", "4"], ["--activation-fn", "gelu"]):
        found = digests(*options)
        assert (found[0] == model, found[1]) == (False, criterion)
    assert digests("--label-smoothing", "0.3")[1] != criterion


def test_the_settings_of_a_model_with_a_configuration_of_its_own_are_told_too():
    usual = ["--task", "language_modeling", "--arch", "transformer_lm"]
    plain = settings_digest(configuration(*usual), "model")
    assert settings_digest(configuration(*usual, "--save-dir", "other"), "model") == plain
    heads = configuration(*usual, "--decoder-attention-heads", "4")
    assert settings_digest(heads, "model") != plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gradinit-gamma", "0"], "gamma must be a number greater than 0, or inf"),
        (["--gradinit-eta", "nan"], "eta must be"),
        (["--lr", "0"], "eta must be"),
        (["--gradinit-iterations", "0"], "iterations must be at least 1"),
        (["--gradinit-lr", "0"], "lr must be"),
        (["--gradinit-min-scale", "3", "--gradinit-max-scale", "2"], "min-scale must lie in"),
        (["--gradinit-max-scale", "0.5"], "max-scale must be a finite number of at least 1"),
        (["--gradinit-max-tokens", "2"], "too few to cut a batch in thirds"),
        (["--gradinit-betas", "0.9"], "'0.9' is not two numbers with a comma"),
        (["--gradinit-betas", "0.9,1"], "betas must be two numbers in"),
        (["--gradinit-max-skipped", "-1"], "max-skipped must be at least 0, not -1"),
        (["--gradinit-save-interval", "-1"], "--gradinit-save-interval must be at least 0"),
        (["--ddp-backend", "fully_sharded"], "does not work with --ddp-backend fully_sharded"),
        (["--ddp-backend", "slowmo"], "does not work with --ddp-backend slowmo"),
        (["--use-bmuf"], "does not work with --use-bmuf"),
        (["--bf16"], "does not work with --tpu or --bf16"),
        (["--pipeline-model-parallel"], "does not work with --pipeline-model-parallel"),
        (["--model-parallel-size", "2"], "does not work with --model-parallel-size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_and_runs_that_cannot_work_are_refused(options, message):
    assert message in refusal(*options)


@pytest.mark.parametrize(
    "option",
    [
        ["--gradinit-iterations", "5"],
        ["--gradinit-preset", "paper"],
        ["--gradinit-optimizer", "sgd"],
        ["--gradinit-scales", "s.json"],
        ["--gradinit-gamma", "inf"],
        ["--gradinit-second-order", "exact"],
        ["--gradinit-precision", "bf16"],
        ["--gradinit-max-skipped", "0"],
        ["--gradinit-save-interval", "0"],
    ],
    ids=" ".join,
)
def test_an_option_without_gradinit_is_refused(option):
    message = refusal(*option, gradinit=False)
    assert message.startswith(f"{option[0]} was given without --gradinit")


def test_without_options_there_is_no_plan():
    assert make_plan(configuration(gradinit=False)) is None
    assert make_plan(Namespace(path="some other program's")) is None


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
    assert {"translation", "language_modeling", "masked_lm"} <= TASK_DATACLASS_REGISTRY.keys()
    for name, dataclass in TASK_DATACLASS_REGISTRY.items():
        assert set(OPTION_NAMES) <= dataclass.__dataclass_fields__.keys(), name


@pytest.mark.parametrize("task", [None, "translation"])
def test_help_names_every_option_its_choices_and_its_default(task):
    """In the group of fairseq-train, and among the task's options in all programs."""
    kind = TASK_DATACLASS_REGISTRY[task] if task else GradInitOptions
    parser = ArgumentParser(prog="p")
    gen_parser_from_dataclass(parser, kind())
    text = " ".join(parser.format_help().split())
    for name in GradInitOptions.__dataclass_fields__:
        if name != "_name":
            assert "--" + name.replace("_", "-") in text
    for choices in (
        "{auto,adam,sgd,sgd-normalized}",
        "{auto,exact,finite-difference}",
        "{fp32,bf16}",
        "--gradinit-centering {on,off}",
        "[--gradinit]",
    ):
        assert choices in text
    assert "0 switches it off (default: 10)" in text


def settings_of(*options: str) -> dict[str, str]:
    """What the signature of such a run says."""
    cfg = configuration(*options)
    plan = make_plan(cfg)
    trainer = SimpleNamespace(cfg=cfg, device="cpu", data_parallel_world_size=1)
    description = describe(trainer, plan, [], bool(plan.centering), None)
    return description.settings(plan.config.second_order)


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        (["--seed", "7"], "seed", "7"),
        (["--gradinit-lr", "0.02"], "lr", "0.02"),
        (["--gradinit-iterations", "7"], "iterations", "7"),
        (["--gradinit-min-scale", "0.3"], "scales", "0.3..5"),
        (["--gradinit-max-tokens", "99"], "tokens", "99"),
        (["--update-freq", "3"], "micro-batches", "3"),
        (["--gradinit-scale-loaded"], "scale-loaded", "on"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_the_signature_says_what_was_given(option, field, value):
    assert settings_of(*option)[field] == value


def test_a_task_whose_configuration_is_older_than_the_options_is_set_up(corpus):
    cfg = OmegaConf.structured(FairseqConfig())
    cfg.task = TranslationConfig(_name="translation", data=str(corpus.translation))
    assert "gradinit" not in cfg.task
    task = tasks.setup_task(cfg.task)
    assert task.cfg.gradinit is False
    assert task.cfg.data == str(corpus.translation)
    assert task.cfg.dataset_impl is cfg.dataset.dataset_impl
    assert task.source_dictionary.index("w1") != task.source_dictionary.unk()


def test_the_signature_names_the_options_that_determine_the_scales():
    plain = settings_of()
    names = ("optimizer", "eta", "second-order", "precision", "centering", "iterations")
    assert [plain[name] for name in names] == ["adam", "0.002", "auto", "fp32", "on", "60"]
    assert "clip-norm" not in plain
    sgd = ["--optimizer", "sgd", "--clip-norm", "0.25", "--gradinit-precision", "bf16"]
    found = settings_of(*sgd, "--gradinit-second-order", "finite-difference")
    names = ("optimizer", "clip-norm", "second-order", "precision")
    assert [found[name] for name in names] == ["sgd", "0.25", "finite-difference", "bf16"]
