"""The outcomes of iterations, read from the device once in each."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_gradinit.engine.history import Iteration, IterationKind
from fairseq_gradinit.engine.weights import ScaledWeights
from fairseq_gradinit.errors import GradInitError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScaleGradient:
    """What one iteration descends; for loss, trial_loss (shape ()) and norm see `Iteration`.

    Attributes:
        by_scales: shape (learned blocks,), the derivative of the gradient norm (`constraint`) or
            of the loss after the trial step over eta (`objective`).
    """

    kind: IterationKind
    by_scales: Tensor
    loss: float
    trial_loss: Tensor | None
    norm: float


class Outcomes:
    """Keeps the record; the outcome of an iteration is read together with the next one's norm.

    Attributes:
        history: the iterations whose outcome has been read.
        skipped: batches skipped so far because a loss or gradient was not finite.
        stopped: whether the processes have agreed to stop.
        pending: an iteration, and its outcome still on the device, shape (6,): whether the scales
            were updated, the trial loss, the smallest and the largest scale, and
            `ScaledWeights.compare`.
    """

    def __init__(self, weights: ScaledWeights, max_skipped: int) -> None:
        self.history: list[Iteration] = []
        self.skipped = 0
        self.stopped = False
        self._weights = weights
        self._max_skipped = max_skipped
        self.pending: tuple[ScaleGradient, Tensor] | None = None

    @property
    def iterations_done(self) -> int:
        return len(self.history) + (self.pending is not None)

    def read(self, values: Sequence[Tensor]) -> list[float]:
        """`values` on the host; records the last iteration, or counts its batch as skipped.

        Raises:
            GradInitError: too many batches were skipped, or the processes differ.
        """
        tensors = [value.double().reshape(1) for value in values]
        if self.pending is None:
            return torch.cat(tensors).tolist() if tensors else []
        (descended, outcome), self.pending = self.pending, None
        on_host = torch.cat([outcome, *tensors]).tolist()
        usable, trial_loss, low, high, differ, stop, *floats = on_host
        self._weights.require_same("scales", differ)
        self.stopped = bool(stop)
        if usable:
            index = len(self.history) + 1
            trial = None if descended.trial_loss is None else trial_loss
            self.history.append(
                Iteration(index, descended.kind, descended.loss, trial, descended.norm, low, high)
            )
        elif math.isfinite(trial_loss):
            self.skip("gradient of the scales", math.nan)
        else:
            self.skip("trial loss", trial_loss)
        return floats

    def skip(self, what: str, value: float) -> None:
        """Count a batch that gave no usable gradient; GradInitError if there were too many."""
        self.skipped += 1
        iteration = len(self.history) + 1
        logger.warning(
            "GradInit iteration %d: the %s is %s, so the batch is skipped (%d of at most %d)",
            iteration,
            what,
            value,
            self.skipped,
            self._max_skipped,
        )
        if self.skipped <= self._max_skipped:
            return
        advice = "lower eta, the learning rate of the scales, or max-scale"
        scales = self._weights.scales.tolist()
        largest = max(range(len(scales)), key=scales.__getitem__)
        if scales[largest] > 1.0:
            name = self._weights.name(largest)
            advice = f"the scale of {name} grew most, to {scales[largest]:.3g}: {advice}"
        elif not self.history and what != "trial loss":
            advice = (
                "not one batch could be used: check that the model has a finite loss at its own "
                "initialisation, and the data"
            )
        raise GradInitError(
            f"the {what} is {value} in GradInit iteration {iteration}, and {self.skipped} batches "
            f"are more than may be skipped; {advice}"
        )
