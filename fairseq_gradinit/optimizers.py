"""The first step of each of fairseq's optimizers, as GradInit can try it before training.

The two tables below are the one place that says which of GradInit's own steps stands for which
optimizer and why, or why none does; `tests/test_optimizers.py` holds them against the optimizers
themselves. Weight decay is left out of a trial of one step; a trial of several is made by the
optimizer itself.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import optim
from fairseq.optim.fused_adam import get_fused_adam_class
from torch import nn

from fairseq_gradinit.config import TARGET_NAMES, TargetName
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.files import shown
from fairseq_gradinit.training_steps import MakeOptimizer

AUTO = "auto"
ADAM_EPS = "adam-eps"
CHOICES = (AUTO, "adam", ADAM_EPS, "sgd", "sgd-normalized")

# fairseq's configuration of an optimizer: a DictConfig, or (legacy ones) a Namespace.
OptimizerConfig = Any


@dataclass(frozen=True)
class TrialStep:
    """The step that GradInit tries: the weights move by `length` learning rates along -A[g].

    Attributes:
        target: what A is, see `GradInitConfig`.
        length: in learning rates.
        eps: of Adam, as it acts in its first step: A[g] = g / (|g| + eps).
    """

    target: TargetName
    length: float = 1.0
    eps: float = 0.0


@dataclass(frozen=True)
class FirstStep:
    """What the first step of an optimizer is, with a gradient g and empty averages.

    Attributes:
        target: the step of GradInit's that it is.
        reason: why it is that one.
        length: how many learning rates long it is, from the optimizer's configuration.
        eps: the epsilon in g / (|g| + eps), from the configuration; None if there is no option.
    """

    target: TargetName
    reason: str
    length: Callable[[OptimizerConfig], float] = lambda optimizer: 1.0
    eps: Callable[[OptimizerConfig], float] | None = None


def trial_step(choice: str, optimizer: OptimizerConfig, steps: int = 1) -> TrialStep:
    """The step to try for `--gradinit-optimizer choice` in a run with this optimizer.

    Args:
        steps: of the trial; several are made by the optimizer, and this is what stands for it in
            the norm constraint and in clipping.

    Raises:
        GradInitError: the choice leaves it to the run's optimizer, which has no such step.
    """
    name = getattr(optimizer, "_name", None)
    for target in TARGET_NAMES:
        if choice == target:
            return TrialStep(target)
    if choice == ADAM_EPS:
        return _with_eps(str(name), optimizer)
    if name not in FIRST_STEPS:
        reason = f": {REFUSED[name]}" if name in REFUSED else ""
        raise GradInitError(
            f"GradInit does not know the first step of --optimizer {name} by itself{reason}; name "
            f"the closest of its own with --gradinit-optimizer {{{','.join(TARGET_NAMES)}}}"
            + (f", and leave out --gradinit-trial-steps {steps}" if steps > 1 else "")
        )
    first = FIRST_STEPS[name]
    return TrialStep(first.target, first.length(optimizer))


def training_optimizer(optimizer: OptimizerConfig) -> MakeOptimizer:
    """Makes the torch optimizer inside of fairseq's own, for trials of several steps."""

    def make(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        built: torch.optim.Optimizer = optim.build_optimizer(optimizer, list(parameters)).optimizer
        return built

    return make


def settings(optimizer: OptimizerConfig) -> str:
    """The settings that the torch optimizer inside of fairseq's own was made with, but for lr."""
    made = training_optimizer(optimizer)([nn.Parameter(torch.zeros(1))])
    shown = {
        name: value
        for name, value in made.defaults.items()
        if name != "lr" and isinstance(value, (int, float, tuple, list))
    }
    text = ",".join(f"{name}={value}" for name, value in shown.items() if value is not False)
    return f"{type(made).__name__}({text})".replace(" ", "")


def _with_eps(name: str, optimizer: OptimizerConfig) -> TrialStep:
    first = FIRST_STEPS.get(name)
    if first is None or first.eps is None:
        able = ", ".join(name for name, first in FIRST_STEPS.items() if first.eps is not None)
        raise GradInitError(
            f"--gradinit-optimizer {ADAM_EPS} takes its epsilon from the run's optimizer, and "
            f"--optimizer {name} has no such option: use one of {able}, or --gradinit-optimizer "
            "adam, which has none"
        )
    return TrialStep(first.target, first.length(optimizer), first.eps(optimizer))


def _eps_of_adam(optimizer: OptimizerConfig) -> float:
    """Epsilon beside |g|, which depends on which Adam fairseq finds on this machine.

    fairseq's own and apex's older kernel divide by sqrt(v) + eps and correct for v = (1 - beta2)
    g^2 afterwards, which makes epsilon larger; apex's newer kernel corrects v before.
    """
    fused = None
    if torch.cuda.is_available() and not getattr(optimizer, "use_old_adam", False):
        fused = get_fused_adam_class()
    eps = float(optimizer.adam_eps)
    if fused is not None and fused.__name__ == "FusedAdamV2":
        return eps
    return eps / math.sqrt(1.0 - _betas("--adam-betas", optimizer.adam_betas)[1])


def _length_of_adamax(optimizer: OptimizerConfig) -> float:
    if not optimizer.no_bias_correction:
        return 1.0
    return 1.0 - _betas("--adamax-betas", optimizer.adamax_betas)[0]


def _betas(option: str, value: Any) -> tuple[float, float]:
    """Decay rates as fairseq stores them: as text, or as a list when they are its default."""
    betas = parse_betas(option, value)
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise GradInitError(f"{option} must be two numbers in [0, 1), not {value}")
    return betas


# What a text can come to that is too large, too deep, or no Python at all.
_NO_NUMBERS = (ArithmeticError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError)


def parse_betas(option: str, value: Any) -> tuple[float, float]:
    """Two numbers out of a text like '0.9,0.98', or out of a sequence.

    Raises:
        GradInitError: `value` is something else.
    """
    try:
        first, second = ast.literal_eval(value) if isinstance(value, str) else value
        return float(first), float(second)
    except _NO_NUMBERS as error:
        raise GradInitError(
            f"{option} {shown(value)} is not two numbers with a comma, like '0.9,0.98'"
        ) from error


FIRST_STEPS: dict[str, FirstStep] = {
    "adam": FirstStep(
        "adam",
        "its averages of g and g^2, corrected for their start at 0, are g and g^2 themselves",
        eps=_eps_of_adam,
    ),
    "cpu_adam": FirstStep(
        "adam",
        "as adam; DeepSpeed's kernel corrects the average of g^2 before it adds epsilon",
        eps=lambda optimizer: float(optimizer.adam_eps),
    ),
    "adamax": FirstStep(
        "adam",
        "its average of g is corrected to g, unless --no-bias-correction leaves it at (1 - beta1) "
        "g, and its running maximum of |g| starts at |g|",
        length=_length_of_adamax,
        eps=lambda optimizer: float(optimizer.adamax_eps),
    ),
    # torch's epsilon of 1e-10 cannot be changed in fairseq.
    "adagrad": FirstStep("adam", "its sum of squares starts at g^2"),
    "sgd": FirstStep("sgd", "its momentum buffer starts at g itself, whatever the momentum"),
    "nag": FirstStep(
        "sgd",
        "it adds momentum times its buffer to g, and the buffer starts at g",
        length=lambda optimizer: 1.0 + float(optimizer.momentum),
    ),
}

# In a sentence: "GradInit does not know the first step of ... by itself: <this>; name ...".
REFUSED: dict[str, str] = {
    "adadelta": "its first step is that of sgd where the gradient is small beside the square root "
    "of --adadelta-eps, and elsewhere a small fraction of adam's, which later steps outgrow",
    "adafactor": "it divides the gradient of a matrix by averages over rows and columns, and with "
    "--scale-parameter its step is in proportion to the size of the weights, which the scales "
    "change",
    "lamb": "with --weight-decay its step is in proportion to the norm of each weight tensor, "
    "which the scales change (without, it is that of adam)",
    "composite": "it has an optimizer and a learning rate for each group of parameters, and "
    "GradInit tries one step for all of them (its length is --gradinit-eta)",
}
