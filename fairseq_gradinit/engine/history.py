"""The record of a GradInit run, one entry for each iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IterationKind = Literal["objective", "constraint"]
KINDS: tuple[IterationKind, ...] = ("objective", "constraint")


@dataclass(frozen=True)
class Iteration:
    """What one iteration did. Losses are in the units of the loss function, per count.

    Attributes:
        kind: `constraint` when the gradient norm exceeded gamma, else `objective`.
        loss: L(S) at the scales before this iteration.
        trial_loss: L(S~) after the trial step; None in a constraint iteration.
        grad_norm: ||g||_p over all blocks together.
        min_scale, max_scale: range of the learned scales after this iteration.
    """

    index: int
    kind: IterationKind
    loss: float
    trial_loss: float | None
    grad_norm: float
    min_scale: float
    max_scale: float
