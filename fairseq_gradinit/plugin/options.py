"""GradInit's options: on fairseq's command line, and their presets.

The options are fields of the task's configuration, so that they reach the trainer and every
checkpoint of any task, and a fairseq without this plugin drops them when it loads one.
"""
# No postponed annotations here: fairseq reads the types of dataclass fields as objects.

from dataclasses import Field, dataclass, field
from enum import Enum
from types import NoneType
from typing import Any, Literal, Optional, get_args

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import ListConfig

from fairseq_gradinit.engine import (
    PRECISION_NAMES,
    SECOND_ORDER_NAMES,
    GradInitConfig,
    NormGains,
    SecondOrder,
)
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.optimizers import CHOICES
from fairseq_gradinit.storage import abbreviate


@dataclass(frozen=True)
class Preset:
    """Values for the options that the user leaves open; these are those of the preset `default`.

    `batch_per_training_batch` is the size of a GradInit batch before its cut in thirds, in training
    batches, unless `max_tokens` says it in tokens. 1.5 makes S and S~ one batch each.
    """

    eta: float | None = None
    centering: Literal["on", "off"] = "on"
    encoder_branches: float = 0.1
    gamma: float = GradInitConfig.gamma
    iterations: int = GradInitConfig.iterations
    lr: float = GradInitConfig.lr
    betas: tuple[float, float] = GradInitConfig.betas
    min_scale: float = GradInitConfig.min_scale
    min_bias_scale: float = GradInitConfig.min_bias_scale
    max_scale: float = GradInitConfig.max_scale
    norm_gains: NormGains = GradInitConfig.norm_gains
    max_tokens: int | None = None
    second_order: SecondOrder = GradInitConfig.second_order
    batch_per_training_batch: float = 1.5


PRESETS = {
    "default": Preset(),
    # The constants of the authors' script for IWSLT'14 De-En.
    "paper": Preset(
        eta=1e-3,
        centering="off",
        encoder_branches=1.0,
        gamma=1000.0,
        iterations=780,
        lr=2.5e-3,
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


def _option(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


def _preset_option(name: str, text: str, open_default: str = "") -> Any:
    """An option whose default is in the presets; None there is shown as `open_default`."""
    values = [getattr(preset, name) for preset in PRESETS.values()]
    default, paper = (open_default if value is None else value for value in values)
    shown = f"{default}" if default == paper else f"{default}; preset paper: {paper}"
    return _option(f"{text} (default: {shown})")


@dataclass
class GradInitOptions(FairseqDataclass):
    """The options; None stands for the value of the preset."""

    gradinit: bool = _option(
        "before the first update of a fresh run, learn one scale per parameter tensor "
        "so that the first optimizer step is as useful as possible (GradInit)",
        default=False,
    )
    gradinit_preset: PresetChoice = _option(  # type: ignore[valid-type]
        "where the options below take their values from when they are not given; "
        "paper: the constants of the GradInit authors for IWSLT'14 De-En (default: default)",
        default="default",
    )
    gradinit_optimizer: TargetChoice = _option(  # type: ignore[valid-type]
        "optimizer whose first step the scales are learned for; auto: the run's "
        "--optimizer, with adam as sign(g); the others take its place (default: auto)",
        default="auto",
    )
    gradinit_iterations: Optional[int] = _preset_option("iterations", "number of scale updates")
    gradinit_lr: Optional[float] = _preset_option("lr", "learning rate of Adam on the scales")
    gradinit_betas: Optional[str] = _preset_option(
        "betas", "decay rates of Adam on the scales, as '0.9,0.98'"
    )
    gradinit_eta: Optional[float] = _preset_option(
        "eta",
        "length of the trial step, in units of the training learning rate, and taken "
        "as it is; the default follows the optimizer's first step where that is longer or "
        "shorter than a learning rate, as with nag, whose is 1 + momentum",
        open_default="the run's peak --lr",
    )
    gradinit_gamma: Optional[float] = _preset_option(
        "gamma",
        "bound on the norm of the gradient over all parameters, in nats per unit of "
        "weight (l1 for adam, l2 for sgd); inf switches the constraint off",
    )
    gradinit_min_scale: Optional[float] = _preset_option("min_scale", "lower bound of a scale")
    gradinit_min_bias_scale: Optional[float] = _preset_option(
        "min_bias_scale", "lower bound of a bias tensor's scale"
    )
    gradinit_max_scale: Optional[float] = _preset_option("max_scale", "upper bound of a scale")
    gradinit_norm_gains: Optional[NormGainsChoice] = _preset_option(  # type: ignore[valid-type]
        "norm_gains",
        "whether the gains of normalisation layers keep scale 1 (fixed) or get a "
        "scale too (learned)",
    )
    gradinit_centering: Optional[CenteringChoice] = _preset_option(  # type: ignore[valid-type]
        "centering",
        "whether the biases of LayerNorms are set so that what each puts out averages "
        f"to zero over the tokens of {CENTERING_SENTENCES} training sentences, before the "
        "scales are learned and again after it",
    )
    gradinit_encoder_branches: Optional[float] = _preset_option(
        "encoder_branches",
        "factor on the weights of the encoder's residual branches (v_proj, out_proj, "
        "fc1, fc2), which then are not learned; small ones keep the encoder's outputs apart "
        "from each other through the first updates; 1 learns them like the others; without "
        "an encoder the default does nothing",
    )
    gradinit_scale_loaded: bool = _option(
        "scale and center tensors too that the model loaded from files while it was "
        "built, such as with --encoder-embed-path; otherwise they stay as they were loaded",
        default=False,
    )
    gradinit_max_tokens: Optional[int] = _preset_option(
        "max_tokens",
        "tokens in a GradInit batch before it is cut in thirds, two of which make the "
        "batch of each gradient",
        open_default=f"{Preset.batch_per_training_batch:g} times the run's --max-tokens",
    )
    gradinit_second_order: Optional[SecondOrderChoice] = _preset_option(  # type: ignore[valid-type]
        "second_order",
        "how products with the Hessian are taken: exact: by double backward through "
        "torch's math attention; finite-difference: from two gradients, with any kernel and "
        "the memory of training; auto: finite-difference if two lengths of the difference "
        "agree, and exact if not",
    )
    gradinit_precision: PrecisionChoice = _option(  # type: ignore[valid-type]
        "precision of the forward pass; bf16: under autocast, while weights and "
        "scales stay in fp32, whatever precision training uses (default: fp32)",
        default="fp32",
    )
    gradinit_save_interval: int = _option(
        "save the state of the learning every so many iterations, so that an "
        "interrupted run can go on; 0 switches it off (default: 10)",
        default=10,
    )
    gradinit_scales: Optional[str] = _option(
        "apply the scales in this file, written by an earlier run beside its "
        "checkpoints, instead of learning them, which leaves the options for learning without "
        "effect; widths and vocabulary may differ from that run's; LayerNorms are centered if "
        "they were in it, unless --gradinit-centering says otherwise"
    )


OPTION_NAMES = tuple(name for name in GradInitOptions.__dataclass_fields__ if name != "_name")

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def read_value(option: Field[Any], task_cfg: Any) -> Any:
    """The value of an option in a task's configuration, by the option's type; None if not given.

    People write them in YAML too, where `off` is a boolean. Choices come as text, and lists too:
    their elements with commas between them.

    Raises:
        GradInitError: the value is none of this type.
    """
    value = getattr(task_cfg, option.name, None)
    if value is None:
        return None
    (kind,) = [kind for kind in get_args(option.type) if kind is not NoneType] or [option.type]
    try:
        return _converted(value, kind)
    except (OverflowError, TypeError, ValueError) as error:
        flag = "--" + option.name.replace("_", "-")
        meant = _KINDS.get(kind) or f"one of {', '.join(choice.value for choice in kind)}"
        raise GradInitError(f"{flag} must be {meant}, not {abbreviate(value)}") from error


def _converted(value: Any, kind: Any) -> Any:
    if issubclass(kind, Enum):
        return str(kind({True: "on", False: "off"}[value] if isinstance(value, bool) else value))
    if kind is str and isinstance(value, (list, ListConfig)):
        return ",".join(map(str, value))
    exact = kind in (bool, str) or isinstance(value, bool)
    fractional = kind is int and isinstance(value, float) and not value.is_integer()
    if fractional or (exact and type(value) is not kind):
        raise ValueError
    return kind(value)


def read_options(task_cfg: Any) -> GradInitOptions:
    """The options in a task's configuration, a DictConfig or (legacy tasks) a Namespace."""
    options = GradInitOptions()
    for name in OPTION_NAMES:
        value = read_value(GradInitOptions.__dataclass_fields__[name], task_cfg)
        if value is not None:
            setattr(options, name, value)
    return options
