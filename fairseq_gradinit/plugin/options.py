"""GradInit's options: on fairseq's command line, and their presets.

The options are fields of the task's configuration, so that they reach the trainer and every
checkpoint of any task, and a fairseq without this plugin drops them when it loads one.
"""
# No postponed annotations here: fairseq reads the types of dataclass fields as objects.

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_gradinit.engine import (
    PRECISION_NAMES,
    SECOND_ORDER_NAMES,
    NormGains,
    SecondOrder,
)
from fairseq_gradinit.plugin.optimizers import CHOICES
from fairseq_gradinit.plugin.option_values import read_value


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

# The size of batches, which a preset can have too, decides what sentences can be drawn.
APPLYING = (
    "gradinit",
    "gradinit_scales",
    "gradinit_centering",
    "gradinit_scale_loaded",
    "gradinit_preset",
    "gradinit_max_tokens",
)
"""What may be given beside scales from a file."""


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


def flag(name: str) -> str:
    """The option as it is given on a command line."""
    return "--" + name.replace("_", "-")
