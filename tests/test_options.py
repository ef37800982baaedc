"""From a command line to a plan: what the options mean, and which of them are refused."""

from __future__ import annotations

import math
import pickle
import sys
from argparse import ArgumentParser, Namespace

import pytest

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
        eta=0.002,
        trial_steps=1,
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
        through_step=False,
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
        trial_steps=1,
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


def test_several_trial_steps_are_those_of_the_run_and_as_long():
    plan = plan_of("--gradinit-trial-steps", "3", "--clip-norm", "0.1")
    assert (plan.config.trial_steps, plan.config.eta) == (3, 0.002)
    assert plan.config.clip_norm == 0.1
    single = plan_of("--gradinit-trial-steps", "1", "--clip-norm", "0.1").config
    assert (single.trial_steps, single.eta) == (1, 0.002)
    assert math.isinf(single.clip_norm)


@pytest.mark.parametrize(
    "wish",
    [
        ["--gradinit-optimizer", "sgd"],
        ["--gradinit-through-step", "--optimizer", "sgd"],
        ["--gradinit-optimizer", "adam-eps"],
    ],
    ids=" ".join,
)
def test_what_is_for_a_trial_of_one_step_is_refused_with_several(wish):
    assert plan_of(*wish).config.trial_steps == 1
    assert plan_of(*wish, "--gradinit-trial-steps", "1").config.trial_steps == 1
    message = refusal(*wish, "--gradinit-trial-steps", "2")
    assert "--gradinit-trial-steps 2" in message
    assert f"{wish[0]} is for a trial of one step" in message


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
    options += ["--gradinit-through-step", "--gradinit-save-interval", "0", "--seed", "17"]
    options += ["--gradinit-optimizer", "sgd"]
    plan = plan_of("--gradinit-preset", "paper", "--gradinit-max-tokens", "99", *options)
    assert plan.config == GradInitConfig(**values, target="sgd", through_step=True, seed=17)
    assert (plan.max_tokens, plan.save_interval) == (99, 0)
    assert not plan_of("--gradinit-preset", "paper", "--gradinit-gamma", "inf").config.constrained


def test_a_derivative_through_a_sign_is_refused():
    with pytest.raises(GradInitError, match="--gradinit-through-step has no effect on sign"):
        plan_of("--gradinit-through-step")
    plan_of("--gradinit-through-step", "--gradinit-optimizer", "adam-eps")


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
        (["--optimizer", "nag", "--momentum", "0.8", "--gradinit-trial-steps", "2"], 0.002),
        (["--optimizer", "nag", "--momentum", "0.8"], 0.002 * 1.8),
        (["--optimizer", "nag", "--momentum", "0.8", "--gradinit-eta", "0.5"], 0.5),
        (["--optimizer", "nag", "--gradinit-preset", "paper"], 1e-3),
        (["--optimizer", "nag", "--gradinit-optimizer", "sgd"], 0.002),
        (["--optimizer", "sgd", "--momentum", "0.8"], 0.002),
        (["--optimizer", "adamax", "--no-bias-correction"], 0.002 * 0.1),
        (
            ["--optimizer", "adamax", "--no-bias-correction", "--gradinit-optimizer", "adam-eps"],
            0.002 * 0.1,
        ),
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
        (["--clip-norm", "0.1", "--gradinit-trial-steps", "2"], 0.1),
        (["--clip-norm", "0.1", "--gradinit-optimizer", "adam-eps"], math.inf),
        (["--clip-norm", "0.1", "--gradinit-optimizer", "sgd-normalized"], math.inf),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_trial_step_is_clipped_as_in_training_where_that_changes_it(options, clip_norm):
    assert plan_of(*options).config.clip_norm == clip_norm


def test_adam_has_an_epsilon_when_it_is_asked_for():
    adam = ["--adam-eps", "1e-3", "--adam-betas", "(0.9, 0.99)", "--use-old-adam"]
    assert plan_of(*adam).config.eps == 0.0
    config = plan_of(*adam, "--gradinit-optimizer", "adam-eps").config
    assert (config.target, config.eps) == ("adam", pytest.approx(1e-2))


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


@pytest.mark.parametrize("optimizer", ["adafactor", "lamb", "adadelta"])
def test_what_is_advised_for_an_optimizer_that_is_not_known_works(optimizer):
    wish = ["--optimizer", optimizer, "--gradinit-trial-steps", "2"]
    message = refusal(*wish)
    advice = "with --gradinit-optimizer {adam,sgd,sgd-normalized}, and leave out "
    assert message.endswith(f"{advice}--gradinit-trial-steps 2")
    assert plan_of(*wish[:2], "--gradinit-optimizer", "sgd").config.target == "sgd"


def test_what_is_for_learning_is_known_to_be_unused_beside_scales_from_a_file():
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
    from fairseq_gradinit.options import settings_digest

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
    from fairseq_gradinit.options import settings_digest

    usual = ["--task", "language_modeling", "--arch", "transformer_lm"]
    plain = settings_digest(configuration(*usual), "model")
    assert settings_digest(configuration(*usual, "--save-dir", "other"), "model") == plain
    heads = configuration(*usual, "--decoder-attention-heads", "4")
    assert settings_digest(heads, "model") != plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gradinit-gamma", "0"], "gamma must be a number greater than 0, or inf"),
        (["--gradinit-gamma", "-5"], "gamma must be"),
        (["--gradinit-trial-steps", "0"], "trial-steps must be at least 1"),
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
        (["--gradinit-max-skipped", "-1"], "max-skipped must be at least 0, not -1"),
        (["--gradinit-save-interval", "-1"], "--gradinit-save-interval must be at least 0"),
        (["--adam-eps", "-1", "--gradinit-optimizer", "adam-eps"], "Adam's eps must be"),
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
        ["--gradinit-second-order", "exact"],
        ["--gradinit-through-step"],
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
    from fairseq_gradinit.options import make_plan

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
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    import fairseq_gradinit.plugin  # noqa: F401
    from fairseq_gradinit.options import OPTION_NAMES

    assert {"translation", "language_modeling", "masked_lm"} <= TASK_DATACLASS_REGISTRY.keys()
    for name, dataclass in TASK_DATACLASS_REGISTRY.items():
        assert set(OPTION_NAMES) <= dataclass.__dataclass_fields__.keys(), name


@pytest.mark.parametrize("task", [None, "translation"])
def test_help_names_every_option_its_choices_and_its_default(task):
    """In the group of fairseq-train, and among the task's options in all programs."""
    from fairseq.dataclass.utils import gen_parser_from_dataclass
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    import fairseq_gradinit.plugin  # noqa: F401
    from fairseq_gradinit.options import GradInitOptions

    kind = TASK_DATACLASS_REGISTRY[task] if task else GradInitOptions
    parser = ArgumentParser(prog="p")
    gen_parser_from_dataclass(parser, kind())
    text = " ".join(parser.format_help().split())
    for name in GradInitOptions.__dataclass_fields__:
        if name != "_name":
            assert "--" + name.replace("_", "-") in text
    for choices in (
        "{auto,adam,adam-eps,sgd,sgd-normalized}",
        "{auto,exact,finite-difference}",
        "{fp32,bf16}",
        "--gradinit-centering {on,off}",
        "[--gradinit]",
    ):
        assert choices in text
    assert "0 switches it off (default: 10)" in text


def signature_fields(*options: str, **more: str) -> dict[str, str]:
    from fairseq_gradinit.log_text import signature
    from fairseq_gradinit.options import make_plan

    cfg = configuration(*options)
    line = signature(make_plan(cfg), cfg, model="m", data="d", device="cpu", **more)
    assert "\n" not in line
    return dict(field.split(":", 1) for field in line.split("|"))


def test_a_task_whose_configuration_is_older_than_the_options_is_set_up(corpus):
    from fairseq import tasks
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.tasks.translation import TranslationConfig
    from omegaconf import OmegaConf

    import fairseq_gradinit.plugin  # noqa: F401

    cfg = OmegaConf.structured(FairseqConfig())
    cfg.task = TranslationConfig(_name="translation", data=str(corpus.translation))
    assert "gradinit" not in cfg.task
    task = tasks.setup_task(cfg.task)
    assert task.cfg.gradinit is False
    assert task.cfg.data == str(corpus.translation)
    assert task.cfg.dataset_impl is cfg.dataset.dataset_impl
    assert task.source_dictionary.index("w1") != task.source_dictionary.unk()


def test_the_signature_names_the_options_that_determine_the_scales():
    plain = signature_fields()
    assert (
        plain.items()
        >= {
            "optimizer": "adam",
            "through-step": "off",
            "second-order": "auto",
            "precision": "fp32",
        }.items()
    )
    assert not {"eps", "clip-norm", "steps-of"} & plain.keys()
    assert signature_fields(second_order="exact")["second-order"] == "exact"
    assert (plain["trial-steps"], plain["eta"], plain["centering"]) == ("1", "0.002", "on")
    several = signature_fields("--gradinit-trial-steps", "5")
    assert (several["trial-steps"], several["eta"]) == ("5", "0.002")
    assert several["steps-of"].startswith("Adam(betas=[0.9,0.999],")
    eps = ["--gradinit-optimizer", "adam-eps", "--adam-betas", "(0.9, 0.99)", "--use-old-adam"]
    assert signature_fields(*eps, "--adam-eps", "1e-3")["eps"] == "0.01"
    sgd = ["--optimizer", "sgd", "--clip-norm", "0.25", "--gradinit-precision", "bf16"]
    more = ["--gradinit-second-order", "finite-difference", "--gradinit-through-step"]
    assert (
        signature_fields(*sgd, *more).items()
        >= {
            "optimizer": "sgd",
            "clip-norm": "0.25",
            "through-step": "on",
            "second-order": "finite-difference",
            "precision": "bf16",
        }.items()
    )
