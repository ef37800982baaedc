"""The record of a GradInit run, one entry for each iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fairseq_gradinit.storage import abbreviate, require_finite, require_type

IterationKind = Literal["objective", "constraint"]
KINDS: tuple[IterationKind, ...] = ("objective", "constraint")


@dataclass(frozen=True)
class Iteration:
    """What one iteration did. Losses are in the units of the loss function, per count.

    Attributes:
        index: from 1.
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


def parse_iteration(row: Any) -> Iteration:
    """Read back what `dataclasses.asdict` and JSON made of an Iteration.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, or has a value it cannot have.
    """
    trial = row["trial_loss"]
    return Iteration(
        index=require_type(row["index"], int),
        kind=parse_kind(row["kind"]),
        loss=require_finite(row["loss"]),
        trial_loss=None if trial is None else require_finite(trial),
        grad_norm=require_finite(row["grad_norm"]),
        min_scale=require_finite(row["min_scale"]),
        max_scale=require_finite(row["max_scale"]),
    )


def parse_kind(name: Any) -> IterationKind:
    """Read back a kind of iteration.

    Raises:
        ValueError: it is none.
    """
    for kind in KINDS:
        if name == kind:
            return kind
    raise ValueError(f"unknown kind of iteration {abbreviate(name)}")
