"""GradInit's options: how they stand on fairseq's command line, and what they mean.

The options are fields of the task's configuration, so that they reach the trainer and every
checkpoint of any task, and a fairseq without this plugin drops them when it loads one.
"""
# No postponed annotations here: fairseq reads the types of dataclass fields as objects.

import ast
import math
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_gradinit.config import TARGET_NAMES, GradInitConfig, NormGains, TargetName
from fairseq_gradinit.errors import GradInitError


@dataclass(frozen=True)
class Preset:
    """Values for the options that the user leaves open.

    Attributes:
        eta: length of the trial step, or None for `eta_per_lr` times the run's peak learning rate.
        batch_per_training_batch: size of a GradInit batch before its cut in thirds, in training
            batches, unless `max_tokens` says it in tokens. 1.5 makes S and S~ one batch each.
    """

    eta: float | None
    eta_per_lr: float
    gamma: float
    iterations: int
    lr: float
    betas: tuple[float, float]
    min_scale: float
    min_bias_scale: float
    max_scale: float
    norm_gains: NormGains
    max_tokens: int | None
    batch_per_training_batch: float = 1.5


PRESETS = {
    "default": Preset(
        eta=None,
        eta_per_lr=3.0,
        gamma=math.inf,
        iterations=120,
        lr=1e-2,
        betas=(0.9, 0.98),
        min_scale=0.2,
        min_bias_scale=0.2,
        max_scale=5.0,
        norm_gains="fixed",
        max_tokens=None,
    ),
    # The constants of the authors' script for IWSLT'14 De-En.
    "paper": Preset(
        eta=1e-3,
        eta_per_lr=1.0,
        gamma=1000.0,
        iterations=780,
        lr=2.5e-3,
        betas=(0.9, 0.98),
        min_scale=0.01,
        min_bias_scale=0.0,
        max_scale=100.0,
        norm_gains="learned",
        max_tokens=6000,
    ),
}

# First step of fairseq's optimizers: those that divide g by a running size of g step along
# sign(g); the momentum buffers of SGD start at the gradient itself.
TARGET_OF_OPTIMIZER: dict[str, TargetName] = {
    "adam": "adam",
    "cpu_adam": "adam",
    "adamax": "adam",
    "adagrad": "adam",
    "sgd": "sgd",
}

PresetChoice = ChoiceEnum(list(PRESETS))
TargetChoice = ChoiceEnum(["auto", *TARGET_NAMES])
NormGainsChoice = ChoiceEnum(["fixed", "learned"])


def _defaults(attribute: str, open_default: str = "") -> str:
    values = {name: getattr(preset, attribute) for name, preset in PRESETS.items()}
    shown = {name: open_default if value is None else value for name, value in values.items()}
    if len(set(shown.values())) == 1:
        return f"(default: {shown['default']})"
    return f"(default: {shown['default']}; preset paper: {shown['paper']})"


@dataclass
class GradInitOptions(FairseqDataclass):
    """The options; None stands for the value of the preset."""

    gradinit: bool = field(
        default=False,
        metadata={
            "help": "before the first update of a fresh run, learn one scale per parameter tensor "
            "so that the first optimizer step is as useful as possible (GradInit)"
        },
    )
    gradinit_preset: PresetChoice = field(  # type: ignore[valid-type]
        default="default",
        metadata={
            "help": "where the options below take their values from when they are not given; "
            "paper: the constants of the GradInit authors for IWSLT'14 De-En (default: default)"
        },
    )
    gradinit_optimizer: TargetChoice = field(  # type: ignore[valid-type]
        default="auto",
        metadata={
            "help": "optimizer whose first step the scales are learned for; auto reads the run's "
            "--optimizer (default: auto)"
        },
    )
    gradinit_iterations: Optional[int] = field(
        default=None,
        metadata={"help": f"number of scale updates {_defaults('iterations')}"},
    )
    gradinit_lr: Optional[float] = field(
        default=None,
        metadata={"help": f"learning rate of Adam on the scales {_defaults('lr')}"},
    )
    gradinit_betas: Optional[str] = field(
        default=None,
        metadata={"help": "decay rates of Adam on the scales, as '0.9,0.98' " + _defaults("betas")},
    )
    gradinit_eta: Optional[float] = field(
        default=None,
        metadata={
            "help": "length of the trial step, in units of the training learning rate "
            + _defaults("eta", f"{PRESETS['default'].eta_per_lr:g} times the run's peak --lr")
        },
    )
    gradinit_gamma: Optional[float] = field(
        default=None,
        metadata={
            "help": "bound on the norm of the gradient over all parameters, in nats per unit of "
            "weight (l1 for adam, l2 for sgd); inf switches the constraint off "
            + _defaults("gamma")
        },
    )
    gradinit_min_scale: Optional[float] = field(
        default=None,
        metadata={"help": f"lower bound of a scale {_defaults('min_scale')}"},
    )
    gradinit_min_bias_scale: Optional[float] = field(
        default=None,
        metadata={"help": f"lower bound of a bias tensor's scale {_defaults('min_bias_scale')}"},
    )
    gradinit_max_scale: Optional[float] = field(
        default=None,
        metadata={"help": f"upper bound of a scale {_defaults('max_scale')}"},
    )
    gradinit_norm_gains: Optional[NormGainsChoice] = field(  # type: ignore[valid-type]
        default=None,
        metadata={
            "help": "whether the gains of normalisation layers keep scale 1 (fixed) or get a "
            f"scale too (learned) {_defaults('norm_gains')}"
        },
    )
    gradinit_max_tokens: Optional[int] = field(
        default=None,
        metadata={
            "help": "tokens in a GradInit batch before it is cut in thirds, two of which make the "
            "batch of each gradient "
            + _defaults(
                "max_tokens",
                f"{PRESETS['default'].batch_per_training_batch:g} times the run's --max-tokens",
            )
        },
    )
    gradinit_scales: Optional[str] = field(
        default=None,
        metadata={
            "help": "apply the scales in this file, written by an earlier run beside its "
            "checkpoints, instead of learning them"
        },
    )


OPTION_NAMES = tuple(name for name in GradInitOptions.__dataclass_fields__ if name != "_name")


def read_options(task_cfg: Any) -> GradInitOptions:
    """The options in a task's configuration, a DictConfig or (legacy tasks) a Namespace."""
    options = GradInitOptions()
    for name in OPTION_NAMES:
        value = getattr(task_cfg, name, None)
        if value is not None:
            setattr(options, name, value)
    return options


@dataclass(frozen=True)
class Plan:
    """What one run will do, every open value filled in.

    Attributes:
        preset: name of the preset that filled the open values.
        config: the engine's settings; with `scales_file` they are not used.
        scales_file: file of scales to apply instead of learning.
        max_tokens: tokens in a GradInit batch before the cut, or None.
        max_sentences: sentences in it, or None.
        micro_batches: micro-batches in one gradient.
    """

    preset: str
    config: GradInitConfig
    scales_file: str | None
    max_tokens: int | None
    max_sentences: int | None
    micro_batches: int


def make_plan(cfg: Any) -> Plan | None:
    """Read a fairseq configuration; None when it does not ask for GradInit.

    Raises:
        GradInitError: an option is out of its range, or the run uses something that GradInit does
            not support.
    """
    # Programs of other projects pass through here too, with configurations of their own.
    options = read_options(getattr(cfg, "task", None))
    if not options.gradinit:
        given = [n for n in OPTION_NAMES if getattr(options, n) != getattr(GradInitOptions, n)]
        if given:
            raise GradInitError(
                f"{_flag(given[0])} was given without --gradinit: add --gradinit, or leave it out"
            )
        return None
    learning = options.gradinit_scales is None
    _refuse_unsupported(cfg)
    preset = PRESETS[str(options.gradinit_preset)]

    def pick(name: str) -> Any:
        value = getattr(options, f"gradinit_{name}")
        return getattr(preset, name) if value is None else value

    eta = pick("eta")
    max_tokens = pick("max_tokens")
    growth = preset.batch_per_training_batch
    sentences = cfg.dataset.batch_size
    if max_tokens is None and cfg.dataset.max_tokens is not None:
        max_tokens = math.ceil(growth * cfg.dataset.max_tokens)
    if max_tokens is not None and max_tokens < 3:
        raise GradInitError(
            f"--gradinit-max-tokens {max_tokens} is too few to cut a batch in thirds"
        )
    return Plan(
        preset=str(options.gradinit_preset),
        config=GradInitConfig(
            eta=preset.eta_per_lr * peak_lr(cfg) if eta is None else eta,
            # Scales from a file are applied whatever the optimizer is.
            target=_target(str(options.gradinit_optimizer), cfg) if learning else "adam",
            gamma=pick("gamma"),
            iterations=pick("iterations"),
            lr=pick("lr"),
            betas=_parse_betas(pick("betas")),
            min_scale=pick("min_scale"),
            min_bias_scale=pick("min_bias_scale"),
            max_scale=pick("max_scale"),
            norm_gains="learned" if pick("norm_gains") == "learned" else "fixed",
        ),
        scales_file=options.gradinit_scales,
        max_tokens=max_tokens,
        max_sentences=None if sentences is None else math.ceil(growth * sentences),
        micro_batches=cfg.optimization.update_freq[0],
    )


def peak_lr(cfg: Any) -> float:
    """The highest learning rate that the run's schedule reaches."""
    if getattr(cfg.lr_scheduler, "_name", None) == "triangular":
        return float(cfg.lr_scheduler.max_lr)
    return float(max(cfg.optimization.lr))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parse_betas(value: Any) -> tuple[float, float]:
    if isinstance(value, tuple):
        return value[0], value[1]
    try:
        first, second = ast.literal_eval(value)
        return float(first), float(second)
    except (ValueError, TypeError, SyntaxError) as error:
        raise GradInitError(
            f"--gradinit-betas {value!r} is not two numbers with a comma, like '0.9,0.98'"
        ) from error


def _target(choice: str, cfg: Any) -> TargetName:
    if choice != "auto":
        return choice  # type: ignore[return-value]
    optimizer = getattr(cfg.optimizer, "_name", None)
    if optimizer not in TARGET_OF_OPTIMIZER:
        raise GradInitError(
            f"GradInit does not know the first step of --optimizer {optimizer}: name the closest "
            f"of its own with --gradinit-optimizer {{{','.join(TARGET_NAMES)}}}"
        )
    return TARGET_OF_OPTIMIZER[optimizer]


def _refuse_unsupported(cfg: Any) -> None:
    parallel = cfg.distributed_training
    unsupported = {
        "--ddp-backend fully_sharded": parallel.ddp_backend == "fully_sharded",
        "--ddp-backend slowmo": parallel.ddp_backend == "slowmo",
        "--pipeline-model-parallel": parallel.pipeline_model_parallel,
        "--model-parallel-size above 1": cfg.common.model_parallel_size > 1,
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--tpu or --bf16 (fairseq takes --bf16 to the TPU path)": cfg.common.tpu or cfg.common.bf16,
    }
    for name, given in unsupported.items():
        if given:
            raise GradInitError(f"GradInit does not work with {name}: leave one of the two out")
