"""GradInit's options: how they stand on fairseq's command line, and what they mean.

The options are fields of the task's configuration, so that they reach the trainer and every
checkpoint of any task, and a fairseq without this plugin drops them when it loads one.
"""
# No postponed annotations here: fairseq reads the types of dataclass fields as objects.

import hashlib
import json
import math
import os
from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Optional, cast

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.optim.lr_scheduler.manual_lr_scheduler import ManualSchedule
from omegaconf import DictConfig, OmegaConf

from fairseq_gradinit.engine import (
    PRECISION_NAMES,
    SECOND_ORDER_NAMES,
    GradInitConfig,
    NormGains,
    Precision,
    SecondOrder,
)
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.optimizers import CHOICES, TrialStep, parse_betas, trial_step
from fairseq_gradinit.plugin.option_values import read_value
from fairseq_gradinit.storage import abbreviate


@dataclass(frozen=True)
class Preset:
    """Values for the options that the user leaves open.

    Attributes:
        eta: length of the trial step, or None for the peak learning rate of the run.
        centering: whether LayerNorms are centered first.
        encoder_branches: fixed scale of the encoder's residual branches, in models that have some.
        batch_per_training_batch: size of a GradInit batch before its cut in thirds, in training
            batches, unless `max_tokens` says it in tokens. 1.5 makes S and S~ one batch each.
    """

    eta: float | None
    centering: Literal["on", "off"]
    encoder_branches: float
    gamma: float
    iterations: int
    lr: float
    betas: tuple[float, float]
    min_scale: float
    min_bias_scale: float
    max_scale: float
    norm_gains: NormGains
    max_tokens: int | None
    second_order: SecondOrder
    batch_per_training_batch: float = 1.5


PRESETS = {
    "default": Preset(
        eta=None,
        centering="on",
        encoder_branches=0.1,
        gamma=math.inf,
        iterations=60,
        lr=1e-2,
        betas=(0.9, 0.98),
        min_scale=0.2,
        min_bias_scale=0.2,
        max_scale=5.0,
        norm_gains="fixed",
        max_tokens=None,
        second_order="auto",
    ),
    # The constants of the authors' script for IWSLT'14 De-En.
    "paper": Preset(
        eta=1e-3,
        centering="off",
        encoder_branches=1.0,
        gamma=1000.0,
        iterations=780,
        lr=2.5e-3,
        betas=(0.9, 0.98),
        min_scale=0.01,
        min_bias_scale=0.0,
        max_scale=100.0,
        norm_gains="learned",
        max_tokens=6000,
        second_order="exact",
    ),
}

CENTERING_SENTENCES = 32
"""Some hundred tokens, whose mean leaves less than 1 % of the power of an output in common."""

PresetChoice = ChoiceEnum(list(PRESETS))
TargetChoice = ChoiceEnum(list(CHOICES))
CenteringChoice = ChoiceEnum(["on", "off"])
NormGainsChoice = ChoiceEnum(["fixed", "learned"])
SecondOrderChoice = ChoiceEnum(list(SECOND_ORDER_NAMES))
PrecisionChoice = ChoiceEnum(list(PRECISION_NAMES))


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
            "help": "optimizer whose first step the scales are learned for; auto: the run's "
            "--optimizer, with adam as sign(g); the others take its place (default: auto)"
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
            "help": "length of the trial step, in units of the training learning rate, and taken "
            "as it is; the default follows the optimizer's first step where that is longer or "
            "shorter than a learning rate, as with nag, whose is 1 + momentum "
            + _defaults("eta", "the run's peak --lr")
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
    gradinit_centering: Optional[CenteringChoice] = field(  # type: ignore[valid-type]
        default=None,
        metadata={
            "help": "whether the biases of LayerNorms are set so that what each puts out averages "
            f"to zero over the tokens of {CENTERING_SENTENCES} training sentences, before the "
            f"scales are learned and again after it {_defaults('centering')}"
        },
    )
    gradinit_encoder_branches: Optional[float] = field(
        default=None,
        metadata={
            "help": "factor on the weights of the encoder's residual branches (v_proj, out_proj, "
            "fc1, fc2), which then are not learned; small ones keep the encoder's outputs apart "
            "from each other through the first updates; 1 learns them like the others; without "
            "an encoder the default does nothing " + _defaults("encoder_branches")
        },
    )
    gradinit_scale_loaded: bool = field(
        default=False,
        metadata={
            "help": "scale and center tensors too that the model loaded from files while it was "
            "built, such as with --encoder-embed-path; otherwise they stay as they were loaded"
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
    gradinit_second_order: Optional[SecondOrderChoice] = field(  # type: ignore[valid-type]
        default=None,
        metadata={
            "help": "how products with the Hessian are taken: exact: by double backward through "
            "torch's math attention; finite-difference: from two gradients, with any kernel and "
            "the memory of training; auto: finite-difference if two lengths of the difference "
            f"agree, and exact if not {_defaults('second_order')}"
        },
    )
    gradinit_precision: PrecisionChoice = field(  # type: ignore[valid-type]
        default="fp32",
        metadata={
            "help": "precision of the forward pass; bf16: under autocast, while weights and "
            "scales stay in fp32, whatever precision training uses (default: fp32)"
        },
    )
    gradinit_max_skipped: int = field(
        default=10,
        metadata={
            "help": "how many batches may be skipped because their loss or gradient is not "
            "finite (default: 10)"
        },
    )
    gradinit_save_interval: int = field(
        default=10,
        metadata={
            "help": "save the state of the learning every so many iterations, so that an "
            "interrupted run can go on; 0 switches it off (default: 10)"
        },
    )
    gradinit_scales: Optional[str] = field(
        default=None,
        metadata={
            "help": "apply the scales in this file, written by an earlier run beside its "
            "checkpoints, instead of learning them, which leaves the options for learning without "
            "effect; widths and vocabulary may differ from that run's; LayerNorms are centered if "
            "they were in it, unless --gradinit-centering says otherwise"
        },
    )


OPTION_NAMES = tuple(name for name in GradInitOptions.__dataclass_fields__ if name != "_name")

APPLYING = (
    *("gradinit", "gradinit_scales", "gradinit_centering", "gradinit_scale_loaded"),
    # The size of batches, which a preset can have too, decides what sentences can be drawn.
    *("gradinit_preset", "gradinit_max_tokens"),
)
"""What may stand beside scales from a file."""


def read_options(task_cfg: Any) -> GradInitOptions:
    """The options in a task's configuration, a DictConfig or (legacy tasks) a Namespace.

    Raises:
        GradInitError: see `read_value`.
    """
    options = GradInitOptions()
    for name in OPTION_NAMES:
        value = read_value(GradInitOptions.__dataclass_fields__[name], task_cfg)
        if value is not None:
            setattr(options, name, value)
    return options


def given_options(options: GradInitOptions, but: Collection[str] = ()) -> list[str]:
    """Names of the options that are not as they are by default, some left out."""
    return [
        name
        for name in OPTION_NAMES
        if name not in but and getattr(options, name) != getattr(GradInitOptions, name)
    ]


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
        save_interval: iterations between two savings of the learning's state; 0 for none.
        centering: whether LayerNorms are centered; None for what was done to learn `scales_file`.
        encoder_branches: fixed scale of the encoder's residual branches; 1 learns them.
        require_encoder: whether a model without such branches is an error.
        scale_loaded: whether tensors that were loaded from files are scaled and centered too.
        unused: options that were given for learning, beside a `scales_file`.
    """

    preset: str
    config: GradInitConfig
    scales_file: str | None
    max_tokens: int | None
    max_sentences: int | None
    micro_batches: int
    save_interval: int
    centering: bool | None
    encoder_branches: float
    require_encoder: bool
    scale_loaded: bool
    unused: tuple[str, ...] = ()


def make_plan(cfg: Any) -> Plan | None:
    """Read a fairseq configuration; None when it does not ask for GradInit.

    Raises:
        GradInitError: an option is out of its range, or the run uses something that GradInit does
            not support.
    """
    # Programs of other projects pass through here too, with configurations of their own.
    options = read_options(getattr(cfg, "task", None))
    if not options.gradinit:
        if given := given_options(options):
            raise GradInitError(
                f"{_flag(given[0])} was given without --gradinit: add --gradinit, or leave it out"
            )
        return None
    refuse_unsupported(cfg, "GradInit")
    if options.gradinit_save_interval < 0:
        raise GradInitError(
            "--gradinit-save-interval must be at least 0, which switches it off, not "
            f"{options.gradinit_save_interval}"
        )
    preset = PRESETS[options.gradinit_preset]
    branches = _pick(options, preset, "encoder_branches")
    if not 0.0 < branches < math.inf:
        raise GradInitError(
            f"--gradinit-encoder-branches must be a number greater than 0, not {branches}"
        )
    growth = preset.batch_per_training_batch
    sentences = _at_least_one("--batch-size", cfg.dataset.batch_size)
    frequency = cfg.optimization.update_freq[0] if cfg.optimization.update_freq else 0
    return Plan(
        preset=options.gradinit_preset,
        config=_engine_config(options, preset, cfg),
        scales_file=options.gradinit_scales,
        max_tokens=_max_tokens(options, preset, cfg),
        max_sentences=None if sentences is None else _times(growth, sentences),
        micro_batches=_at_least_one("--update-freq", frequency),
        save_interval=options.gradinit_save_interval,
        centering=_centering(options, preset),
        encoder_branches=branches,
        require_encoder=options.gradinit_encoder_branches is not None,
        scale_loaded=options.gradinit_scale_loaded,
        unused=_unused(options),
    )


def _unused(options: GradInitOptions) -> tuple[str, ...]:
    if options.gradinit_scales is None:
        return ()
    return tuple(_flag(name) for name in given_options(options, APPLYING))


def _engine_config(options: GradInitOptions, preset: Preset, cfg: Any) -> GradInitConfig:
    step = TrialStep("adam")
    # Scales from a file are applied whatever the optimizer is.
    if options.gradinit_scales is None:
        step = trial_step(options.gradinit_optimizer, cfg.optimizer)
    eta = _pick(options, preset, "eta")
    if eta is None:
        eta = peak_lr(cfg) * step.length
        if not 0.0 < eta < math.inf:
            raise GradInitError(
                "--gradinit-eta must be a number greater than 0, and --lr and --optimizer "
                f"make it {eta}: change them, or give it"
            )
    # Clipping leaves sign(g) and g/||g|| as they are.
    clip_norm = cfg.optimization.clip_norm if step.target == "sgd" else 0.0
    return GradInitConfig(
        eta=eta,
        target=step.target,
        clip_norm=clip_norm if clip_norm > 0 else math.inf,
        gamma=_pick(options, preset, "gamma"),
        iterations=_pick(options, preset, "iterations"),
        lr=_pick(options, preset, "lr"),
        betas=parse_betas("--gradinit-betas", _pick(options, preset, "betas")),
        min_scale=_pick(options, preset, "min_scale"),
        min_bias_scale=_pick(options, preset, "min_bias_scale"),
        max_scale=_pick(options, preset, "max_scale"),
        norm_gains=_pick(options, preset, "norm_gains"),
        second_order=_pick(options, preset, "second_order"),
        precision=cast(Precision, options.gradinit_precision),
        max_skipped=options.gradinit_max_skipped,
        seed=cfg.common.seed,
    )


def _centering(options: GradInitOptions, preset: Preset) -> bool | None:
    if options.gradinit_centering is None and options.gradinit_scales is not None:
        return None
    centering: str = _pick(options, preset, "centering")
    return centering == "on"


def _max_tokens(options: GradInitOptions, preset: Preset, cfg: Any) -> int | None:
    found: int | None = _pick(options, preset, "max_tokens")
    name, given = "--gradinit-max-tokens", found
    if found is None and cfg.dataset.max_tokens is not None:
        name, given = "--max-tokens", cfg.dataset.max_tokens
        found = _times(preset.batch_per_training_batch, cfg.dataset.max_tokens)
    if found is not None and found < 3:
        raise GradInitError(f"{name} {given} is too few to cut a batch in thirds")
    return found


def _times(growth: float, size: int) -> int:
    """Rounded up; exact, and so without bounds."""
    return math.ceil(Fraction(growth) * size)


def _at_least_one(name: str, value: Any) -> Any:
    """`value`, where None stands for an option that is not given."""
    if value is not None and value < 1:
        raise GradInitError(f"{name} must be at least 1, not {value}")
    return value


def _pick(options: GradInitOptions, preset: Preset, name: str) -> Any:
    value = getattr(options, f"gradinit_{name}")
    return getattr(preset, name) if value is None else value


def peak_lr(cfg: Any) -> float:
    """The highest learning rate that the run's schedule reaches."""
    schedule = getattr(cfg.lr_scheduler, "_name", None)
    if schedule == "triangular":
        return float(cfg.lr_scheduler.max_lr)
    rates = list(cfg.optimization.lr)
    if schedule == "manual":
        # Without either of the two dictionaries the rate stays --lr.
        rates = _manual_rates(cfg.lr_scheduler) or rates
    return float(max(rates, default=math.nan))


def _manual_rates(schedule: Any) -> list[float]:
    """All rates in the dictionaries of fairseq's schedule that is written down by hand."""
    rates: list[float] = []
    for option in ("epoch2lr", "update2lr"):
        text = getattr(schedule, option)
        try:
            rates += ManualSchedule.parse_manuallr_args(None, text).values()
        except (ValueError, TypeError, SyntaxError, AttributeError) as error:
            raise GradInitError(
                f"--{option} {abbreviate(text)} is no dictionary of learning rates, such as "
                "\"{'1-3': 1e-3, '4': 5e-4}\""
            ) from error
    return rates


def settings_digest(cfg: Any, section: str) -> str:
    """Eight hexadecimal digits that change with what a section of the configuration says.

    Legacy models and criteria have the whole command line as theirs; of that, what belongs to other
    sections is left out, since it may change while a run goes on. So are paths.
    """
    found = getattr(cfg, section)
    values: dict[Any, Any] = {}
    if isinstance(found, DictConfig):
        values = cast(dict[Any, Any], OmegaConf.to_container(found, resolve=True))
    elif isinstance(found, Namespace):
        groups = (cfg[name] for name in cfg if name not in ("model", "criterion"))
        elsewhere = {key for group in groups if isinstance(group, DictConfig) for key in group}
        values = {key: value for key, value in vars(found).items() if key not in elsewhere}
    kept = {k: v for k, v in values.items() if not (isinstance(v, str) and os.sep in v)}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def refuse_unsupported(cfg: Any, what: str) -> None:
    """Refuse a run in which no process sees the whole model and its global gradient.

    Args:
        what: what does not work there, as the error says it.

    Raises:
        GradInitError: it is one.
    """
    parallel = cfg.distributed_training
    apart = "its processes train apart, so there is no global gradient: use --ddp-backend"
    whole = "no process holds the whole model, whose gradient GradInit needs: leave one out"
    unsupported = {
        "--ddp-backend fully_sharded": (
            parallel.ddp_backend == "fully_sharded",
            "each process holds a part of each tensor, and a scale belongs to the whole: use "
            "--ddp-backend pytorch_ddp, with --checkpoint-activations if memory is short",
        ),
        "--ddp-backend slowmo": (parallel.ddp_backend == "slowmo", f"{apart} pytorch_ddp"),
        "--use-bmuf": (cfg.optimization.use_bmuf, f"{apart} pytorch_ddp without it"),
        "--pipeline-model-parallel": (parallel.pipeline_model_parallel, whole),
        "--model-parallel-size above 1": (cfg.common.model_parallel_size > 1, whole),
        "--tpu or --bf16": (
            cfg.common.tpu or cfg.common.bf16,
            "fairseq takes both to TPUs: use --fp16 or --amp, or leave it out",
        ),
    }
    for name, (given, advice) in unsupported.items():
        if given:
            raise GradInitError(f"{what} does not work with {name}; {advice}")
