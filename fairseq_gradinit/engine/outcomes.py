"""The outcomes of iterations, read from the device once in each."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.engine.objective import ScaleGradient
from fairseq_gradinit.engine.weights import ScaledWeights
from fairseq_gradinit.errors import GradInitError

logger = logging.getLogger(__name__)


class Outcomes:
    """Reads the outcome of an iteration together with the next one's norm, and keeps the record.

    So the host waits for the device once in each iteration, when it must know the norm of the
    gradient.

    Attributes:
        history: the iterations whose outcome has been read.
        skipped: batches skipped so far because a loss or gradient was not finite.
        stopped: whether the processes have agreed to stop.
    """

    def __init__(self, weights: ScaledWeights, max_skipped: int) -> None:
        self.history: list[Iteration] = []
        self.skipped = 0
        self.stopped = False
        self._weights = weights
        self._max_skipped = max_skipped
        self._pending: tuple[ScaleGradient, Tensor] | None = None

    @property
    def iterations_done(self) -> int:
        return len(self.history) + (self._pending is not None)

    def expect(self, descended: ScaleGradient, outcome: Tensor) -> None:
        """Take note of an iteration whose outcome is still on the device.

        Args:
            outcome: whether the scales were updated, the trial loss, the smallest and the largest
                scale, and `ScaledWeights.compare`; shape (6,).
        """
        self._pending = descended, outcome

    def read(self, values: Sequence[Tensor]) -> list[float]:
        """`values` on the host, together with the outcome of the last iteration.

        Raises:
            GradInitError: too many batches were skipped, or the processes differ.
        """
        pending, self._pending = self._pending, None
        tensors = [value.double().reshape(1) for value in values]
        if pending is None:
            return torch.cat(tensors).tolist() if tensors else []
        descended, outcome = pending
        floats: list[float] = torch.cat([outcome, *tensors]).tolist()
        self._settle(descended, floats[: len(outcome)])
        return floats[len(outcome) :]

    def _settle(self, descended: ScaleGradient, outcome: Sequence[float]) -> None:
        """Record an iteration, or count it as skipped."""
        usable, trial_loss, low, high, differ, stop = outcome
        self._weights.require_same("scales", differ)
        self.stopped = bool(stop)
        if not usable:
            what = "gradient of the scales" if math.isfinite(trial_loss) else "trial loss"
            self.skip(what, math.nan if math.isfinite(trial_loss) else trial_loss)
            return
        self.history.append(
            Iteration(
                index=len(self.history) + 1,
                kind=descended.kind,
                loss=descended.loss,
                trial_loss=None if descended.trial_loss is None else trial_loss,
                grad_norm=descended.norm,
                min_scale=low,
                max_scale=high,
            )
        )

    def skip(self, what: str, value: float) -> None:
        """Count a batch that gave no usable gradient.

        Raises:
            GradInitError: there were too many.
        """
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
