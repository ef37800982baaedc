"""A word on learning rates at which even GradInit wants a short warmup."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from fairseq_gradinit.blocks import Block
from fairseq_gradinit.optimizers import FIRST_STEPS

HELD = 0.6
"""lr sqrt(d ffn) up to which no warmup is needed: between 0.51, where all runs of
docs/experiments.md trained, and 0.72 and 1.02, where one of one and three of four did not."""
SHORT = 0.07
"""Of training, as a warmup: with 5 and 7 % all runs at 0.72 and 1.02 trained, with 2.5 and 3.3 %
three of four."""


def short_warmup_advice(cfg: Any, blocks: Iterable[Block]) -> str | None:
    """What to do about a run that begins at too high a rate; None if it does not.

    Adam's first updates move every element by the learning rate in a direction on which the tokens
    agree. Both matrices of a feed-forward branch together then add about (updates lr)^2 d ffn times
    their input to the residual stream, however they were initialised.

    Args:
        cfg: of the run, as fairseq's trainer has it.
    """
    first = FIRST_STEPS.get(getattr(cfg.optimizer, "_name", ""))
    sizes = [b.parameter.numel() for b in blocks if b.name.endswith("fc1.weight")]
    # Schedules without this option have ways of their own to begin with a small rate.
    warmup = getattr(cfg.lr_scheduler, "warmup_updates", None)
    if first is None or first.target != "adam" or not sizes or warmup != 0:
        return None
    lr, size = float(cfg.optimization.lr[0]), max(sizes)
    if lr * math.sqrt(size) <= HELD:
        return None
    length = math.ceil(SHORT * cfg.optimization.max_update)
    suggested = f"--warmup-updates {length}" if length else "some 7 % of training"
    return (
        f"--lr {lr:g} times the square root of {size:,}, the size of fc1, is "
        f"{lr * math.sqrt(size):.2f}: at 0.7 and more, training without warmup failed in most of "
        f"our runs from GradInit too, and a short warmup was enough: {suggested}"
    )
