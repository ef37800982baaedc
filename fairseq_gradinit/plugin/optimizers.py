"""The first step of each of fairseq's optimizers, as GradInit can try it before training.

The two tables below are the one place that says which of GradInit's own steps stands for which
optimizer and why, or why none does; `tests/test_optimizers.py` holds them against the optimizers
themselves. Weight decay is left out of the trial.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fairseq_gradinit.engine import TARGET_NAMES, TargetName
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.storage import abbreviate

AUTO = "auto"
CHOICES = (AUTO, *TARGET_NAMES)

# fairseq's configuration of an optimizer: a DictConfig, or (legacy ones) a Namespace.
OptimizerConfig = Any


@dataclass(frozen=True)
class TrialStep:
    """The step that GradInit tries: the weights move by `length` learning rates along -A[g].

    Attributes:
        target: what A is, see `GradInitConfig`.
        length: in learning rates.
    """

    target: TargetName
    length: float = 1.0


def trial_step(choice: str, optimizer: OptimizerConfig) -> TrialStep:
    """The step to try for `--gradinit-optimizer choice` in a run with this optimizer.

    Raises:
        GradInitError: the choice leaves it to the run's optimizer, which has no such step.
    """
    name = getattr(optimizer, "_name", None)
    for target in TARGET_NAMES:
        if choice == target:
            return TrialStep(target)
    if name not in FIRST_STEPS:
        reason = f": {REFUSED[name]}" if name in REFUSED else ""
        raise GradInitError(
            f"GradInit does not know the first step of --optimizer {name} by itself{reason}; name "
            f"the closest of its own with --gradinit-optimizer {{{','.join(TARGET_NAMES)}}}"
        )
    return FIRST_STEPS[name](optimizer)


def _adamax(optimizer: OptimizerConfig) -> TrialStep:
    if not optimizer.no_bias_correction:
        return TrialStep("adam")
    betas = parse_betas("--adamax-betas", optimizer.adamax_betas)
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise GradInitError(
            f"--adamax-betas must be two numbers in [0, 1), not {optimizer.adamax_betas}"
        )
    return TrialStep("adam", 1.0 - betas[0])


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
            f"{option} {abbreviate(value)} is not two numbers with a comma, like '0.9,0.98'"
        ) from error


# Made from an optimizer's configuration, for a gradient g and empty averages.
FIRST_STEPS: dict[str, Callable[[OptimizerConfig], TrialStep]] = {
    # Its averages of g and g^2, corrected for their start at 0, are g and g^2 themselves.
    "adam": lambda _: TrialStep("adam"),
    # As adam, in DeepSpeed's kernel.
    "cpu_adam": lambda _: TrialStep("adam"),
    # Its average of g is corrected to g, unless --no-bias-correction leaves it at (1 - beta1) g,
    # and its running maximum of |g| starts at |g|.
    "adamax": _adamax,
    # Its sum of squares starts at g^2.
    "adagrad": lambda _: TrialStep("adam"),
    # Its momentum buffer starts at g itself, whatever the momentum.
    "sgd": lambda _: TrialStep("sgd"),
    # It adds momentum times its buffer to g, and the buffer starts at g.
    "nag": lambda optimizer: TrialStep("sgd", 1.0 + float(optimizer.momentum)),
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
