"""The first step of each of fairseq's optimizers, as GradInit can try it before training.

`FIRST_STEPS` is the one place that says which of GradInit's own steps stands for which optimizer
and why. Weight decay is left out of the trial.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from fairseq_gradinit.engine import TARGET_NAMES, TargetName
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.storage import abbreviate

CHOICES = ("auto", *TARGET_NAMES)


class TrialStep(NamedTuple):
    """The weights move by `length` learning rates along -A[g]; `target` says what A is."""

    target: TargetName
    length: float = 1.0


def trial_step(choice: str, optimizer: Any) -> TrialStep:
    """The step to try for `--gradinit-optimizer choice` in a run with this optimizer's settings."""
    if choice != "auto":
        return TrialStep(cast(TargetName, choice))
    name = getattr(optimizer, "_name", None)
    if name not in FIRST_STEPS:
        raise GradInitError(
            f"GradInit does not know the first step of --optimizer {name} by itself; name the "
            f"closest of its own with --gradinit-optimizer {{{','.join(TARGET_NAMES)}}}"
        )
    return FIRST_STEPS[name](optimizer)


def _adamax(optimizer: Any) -> TrialStep:
    beta, _ = parse_betas("--adamax-betas", optimizer.adamax_betas)
    return TrialStep("adam", 1.0 - beta if optimizer.no_bias_correction else 1.0)


def parse_betas(option: str, value: Any) -> tuple[float, float]:
    """Two numbers out of a text like '0.9,0.98', or out of a sequence."""
    try:
        first, second = ast.literal_eval(value) if isinstance(value, str) else value
        return float(first), float(second)
    except (SyntaxError, TypeError, ValueError) as error:
        raise GradInitError(
            f"{option} {abbreviate(value)} is not two numbers with a comma, like '0.9,0.98'"
        ) from error


# Made from an optimizer's configuration, for a gradient g and empty averages.
FIRST_STEPS: dict[str, Callable[[Any], TrialStep]] = {
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
