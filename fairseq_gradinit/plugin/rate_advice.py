"""Warnings about the learning rate of the first updates, which GradInit prepares for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from fairseq_gradinit.engine import Block
from fairseq_gradinit.plugin.optimizers import FIRST_STEPS
from fairseq_gradinit.plugin.plan import peak_lr

HELD = 0.6
"""lr sqrt(d ffn) up to which no warmup is needed: between 0.51, where all runs of
docs/experiments.md trained, and 0.72 and 1.02, where one of one and three of four did not."""
SHORT = 0.07
"""Of training, as a warmup: with 5 and 7 % all runs at 0.72 and 1.02 trained, with 2.5 and 3.3 %
three of four. Up to twice as much passes for the short warmup that the log recommends."""
FAR = 4.0
"""The factor from which two learning rates differ. The preset `paper` has 2, as its authors do (eta
1e-3 for lr 5e-4); of the runs in docs/experiments.md some with 3 trained, and the one with 10 did
not."""


class Beginning(NamedTuple):
    """The first learning rate, and whether it still rises after twice `SHORT` of training.

    It does not if the length of training is open.
    """

    rate: float
    rising: bool


def ask_scheduler(trainer: Any) -> Beginning:
    """Move the scheduler of a fresh run as its first updates would, and read the rates.

    It does not come back: the caller has fairseq build optimizer and scheduler again.
    """

    def rate_after(updates: int) -> float:
        trainer.lr_scheduler.step_update(updates)
        return float(trainer.get_lr())

    trainer.lr_scheduler.step_begin_epoch(1)
    first = rate_after(0)
    short = math.ceil(2 * SHORT * trainer.cfg.optimization.max_update)
    return Beginning(first, rising=short > 0 and rate_after(short) < rate_after(short + 1))


def rate_warning(cfg: Any, blocks: Iterable[Block], eta: float, beginning: Beginning) -> str | None:
    """What to do about a run whose first updates are not those to prepare for; None if they are.

    Adam's first updates move every element by the learning rate in a direction on which the tokens
    agree. Both matrices of a feed-forward branch together then add about (updates lr)^2 d ffn times
    their input to the residual stream, however they were initialised. So from some rate on a short
    warmup is right, although it never takes the step that GradInit tries; below, none is.

    `eta` is the length of the trial step that the scales are learned for; NaN if unknown.
    """
    known = FIRST_STEPS.get(getattr(cfg.optimizer, "_name", ""))
    step = known(cfg.optimizer) if known else None
    lr, updates = float(cfg.optimization.lr[0]), math.ceil(SHORT * cfg.optimization.max_update)
    short_warmup = f"--warmup-updates {updates}" if updates else "some 7 % of training"
    sizes = [b.parameter.numel() for b in blocks if b.name.endswith("fc1.weight")]
    size = max(sizes, default=0)
    too_high = step is not None and step.target == "adam" and lr * math.sqrt(size) > HELD
    slow = beginning.rate * FAR < peak_lr(cfg)
    if too_high and not slow:
        return (
            f"--lr {lr:g} times the square root of {size:,}, the size of fc1, is "
            f"{lr * math.sqrt(size):.2f}: at 0.7 and more, training without warmup failed in most "
            f"of our runs from GradInit too, and a short warmup was enough: {short_warmup}"
        )
    length = step.length if step else 1.0
    wanted, found = eta / length, beginning.rate
    close = math.isnan(wanted) or wanted / FAR <= found <= wanted * FAR
    if close or (too_high and not beginning.rising):
        return None
    both = f"the first update has learning rate {found:g}, and the scales are for {wanted:g}"
    if not slow or found > wanted:
        return f"{both}: learn them for the first update, with --gradinit-eta {found * length:g}"
    instead = "use --lr-scheduler polynomial_decay --warmup-updates 0"
    if too_high:
        instead = f"a short warmup is enough: {short_warmup}"
    return f"{both}: the step that GradInit prepares is never taken; {instead}"
