"""GradInit's optimisation of the scales: plain PyTorch, any model, any loss.

Implements algorithm 1 of Zhu et al., "GradInit: Learning to Initialize Neural Networks for Stable
and Efficient Training" (NeurIPS 2021, arXiv:2102.08098):

    minimise over m   L(S~; theta_m - eta A[g_m])
    with              theta_m = {m_i W_i},  g_m = grad L(S; theta_m)
    subject to        ||g_m||_p <= gamma,  min_scale <= m_i <= max_scale

An iteration first takes the first-order gradient g_m. Only when its norm exceeds gamma does it pay
for a second-order product, to descend the norm; otherwise it takes the trial step, and descends
the loss after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_gradinit.engine.batch_pairs import BatchPair
from fairseq_gradinit.engine.blocks import Block
from fairseq_gradinit.engine.config import GradInitConfig, SecondOrder
from fairseq_gradinit.engine.gradients import Halve, LossFunction, LossGradients, MeanGradient
from fairseq_gradinit.engine.hessian import HessianProducts
from fairseq_gradinit.engine.history import Iteration, IterationKind
from fairseq_gradinit.engine.outcomes import Outcomes, ScaleGradient
from fairseq_gradinit.engine.processes import OneProcess, Processes
from fairseq_gradinit.engine.state import LearnerState
from fairseq_gradinit.engine.trial_step import first_step, global_norm, norm_direction
from fairseq_gradinit.engine.weights import ScaledWeights
from fairseq_gradinit.errors import GradInitError


@dataclass(frozen=True)
class Learned:
    """What a GradInit run came to.

    Attributes:
        scale_of: the scale of every block by name, of those that are not learned too.
        second_order: how second-order products were taken; `auto` when it never had to choose.
    """

    scale_of: dict[str, float]
    history: tuple[Iteration, ...]
    skipped: int
    second_order: SecondOrder


class ScaleLearner:
    """Learns one scale per learned block, one iteration at a time.

    Between iterations the parameters hold m_i W_i, and their gradients are None. Each of the
    `processes` that share the batches has a learner of its own; GradInitError if they hold
    different weights. For the other arguments see `learn_scales`.
    """

    def __init__(
        self,
        blocks: list[Block],
        loss: LossFunction,
        config: GradInitConfig,
        processes: Processes | None = None,
        halve: Halve | None = None,
    ) -> None:
        self.config = config
        self._processes = processes or OneProcess()
        self.weights = ScaledWeights(blocks, config, self._processes)
        self.outcomes = Outcomes(self.weights, config.max_skipped)
        self._gradients = LossGradients(
            self.weights.parameters, loss, config.precision, self._processes, halve
        )
        self._products = HessianProducts(self.weights, self._gradients, config)
        self._first_loss: float | None = None
        self._last_kind: IterationKind | None = None

    @property
    def pairs_used(self) -> int:
        """Pairs of batches that the scales depend on: the position in the data."""
        return self.outcomes.iterations_done + self.outcomes.skipped

    def step(self, pair: BatchPair, stop: bool = False) -> None:
        """Do one iteration: descend `gradient(pair)` by Adam, keep the scales in their bounds.

        A pair whose loss or gradient is not finite is skipped and counted. If one process says
        `stop`, the next call sets `outcomes.stopped` on each, and does nothing else.

        Raises:
            GradInitError: too many batches were skipped, or the processes differ.
        """
        found = self.gradient(pair)
        if found is None:
            return
        self._last_kind = found.kind
        trial_loss = found.trial_loss if found.trial_loss is not None else found.by_scales.sum()
        # Adam squares the gradient.
        usable = torch.isfinite(found.by_scales.square()).all() & torch.isfinite(trial_loss)
        self.weights.descend(found.kind, found.by_scales, usable)
        scales = self.weights.scales.detach()
        own = torch.stack([usable.double(), trial_loss.double(), *torch.aminmax(scales)])
        self.outcomes.pending = found, torch.cat([own, self.weights.compare(scales, stop)])

    def gradient(self, pair: BatchPair) -> ScaleGradient | None:
        """The derivative to descend at the present scales; leaves the weights as they were.

        None when the loss or its gradient is not finite, or the learner has stopped.
        """
        # An exact product is likely to follow: kinds of iterations come in runs.
        keep_graph = self._products.second_order == "exact" and self._last_kind == "constraint"
        first = self._gradients.of_mean(pair.first, keep_graph)
        # Its sign and its norm are those of the sum, not sums of signs and norms.
        self._processes.sum_(first.by_parameter)
        norm = global_norm(first.by_parameter, self.config.norm_order)
        begins = self.pairs_used == 0
        loss, count, norm_value = self.outcomes.read([first.loss, first.count, norm])
        if begins and math.isfinite(loss):
            self._first_loss = loss
        if self.outcomes.stopped:
            return None
        if not count > 0.0:
            raise GradInitError(
                f"a batch of GradInit counts {count} items to average the loss over: "
                "the sample size that the criterion returns must be greater than 0"
            )
        for what, value in (("loss", loss), ("gradient norm", norm_value)):
            if not math.isfinite(value):
                self.outcomes.skip(what, value)
                return None
        if norm_value > self.config.gamma:
            # d||g||_p / dm_i = <H v, W_i>, with v the derivative of the norm by g.
            vector = norm_direction(first.by_parameter, norm, self.config.norm_order)
            by_scales = self._products.by_scales(pair.first, first, vector)
            return ScaleGradient("constraint", by_scales, loss, None, norm_value)
        first.graph.clear()
        by_scales, trial_loss = self._objective(pair.second, first)
        return ScaleGradient("objective", by_scales, loss, trial_loss, norm_value)

    def _objective(self, batches: Sequence[Any], first: MeanGradient) -> tuple[Tensor, Tensor]:
        """d L(S~; theta_m - eta A[g_m]) / dm_i over eta, and L(S~) there; A[g_m] is a constant.

        `batches` are S~, and `first` is g_m, the sum over processes; it is used up.
        """
        with torch.no_grad():
            step = first_step(first.by_parameter, self.config)
            torch._foreach_add_(self.weights.parameters, step, alpha=-self.config.eta)
        # They are as large as the model.
        first.by_parameter.clear()
        del step
        second = self._gradients.of_mean(batches)
        by_scales = self.weights.dots(second.by_parameter)
        self.weights.put()
        return by_scales / self.config.eta, second.loss

    def agree_to_stop(self, stop: bool) -> bool:
        """Whether a process wants all of them to stop; all must ask."""
        return bool(self.weights.compare(self.weights.scales.detach(), stop)[1])

    def flush(self) -> None:
        """Read the outcome of the last iteration; raises as `step`."""
        self.outcomes.read([])

    def state(self) -> LearnerState:
        """What another learner needs to go on from here, after `load`."""
        self.flush()
        return LearnerState(
            scales=tuple(self.weights.scales.tolist()),
            moments=self.weights.moments(),
            history=tuple(self.outcomes.history),
            skipped=self.outcomes.skipped,
            second_order=self._products.second_order,
            first_loss=self._first_loss,
            last_kind=self._last_kind,
        )

    def fits(self, state: LearnerState, pair: BatchPair) -> bool:
        """Whether the first batch of all, `pair`, has the loss that it had in the run of `state`.

        Other data under the same indices, or another model of the same weights, show here if they
        change the loss by more than 0.1 %. To be asked before the first iteration.
        """
        loss = float(self._gradients.of_mean(pair.first).loss)
        if state.first_loss is None:
            return not math.isfinite(loss)
        # Kernels of GPUs do not add in the same order every time.
        return math.isclose(loss, state.first_loss, rel_tol=1e-3)

    def load(self, state: LearnerState) -> None:
        """Go on from the `state` of a learner that was set up as this one is."""
        self.weights.load(state.scales, state.moments)
        self.outcomes.history = list(state.history)
        self.outcomes.skipped = state.skipped
        self._first_loss = state.first_loss
        self._last_kind = state.last_kind
        self._products.second_order = state.second_order

    def learned(self) -> Learned:
        """What has been learned so far."""
        self.flush()
        return Learned(
            scale_of=self.weights.scale_of(),
            history=tuple(self.outcomes.history),
            skipped=self.outcomes.skipped,
            second_order=self._products.second_order,
        )
