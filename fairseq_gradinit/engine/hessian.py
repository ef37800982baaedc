"""Products of the Hessian of the mean loss with a vector, exactly or by finite differences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_gradinit.engine.config import GradInitConfig, Precision
from fairseq_gradinit.engine.gradients import LossGradients, MeanGradient
from fairseq_gradinit.engine.trial_step import global_norm
from fairseq_gradinit.engine.weights import ScaledWeights
from fairseq_gradinit.errors import GradInitError, said_by

logger = logging.getLogger(__name__)

RELATIVE_LENGTH: dict[Precision, float] = {"fp32": 0.25, "bf16": 1.0}
"""Length of the finite difference, in units of sqrt(machine epsilon) ||theta|| / ||v||. Longer
ones are less exact where the loss is smooth, and shorter ones drown in rounding."""

AGREEMENT = 0.3
"""Relative difference of two finite differences, one twice as long, up to which `auto` trusts
them. The kinks of ReLU alone make them differ by about 0.1 at a few hundred tokens."""


class HessianProducts:
    """H v, H being the Hessian of the mean loss of some batches at the present weights.

    Attributes:
        second_order: how products are taken; `auto` until the first has been.
    """

    def __init__(
        self, weights: ScaledWeights, gradients: LossGradients, config: GradInitConfig
    ) -> None:
        self.second_order = config.second_order
        self._precision = config.precision
        self._weights = weights
        self._gradients = gradients

    def by_scales(
        self, batches: Sequence[Any], gradient: MeanGradient, vector: list[Tensor]
    ) -> Tensor:
        """<H v, W_i> for every learned block, shape (learned,); leaves the weights as they were.

        `gradient`, at the same weights and batches and summed over processes, and `vector` are
        used up.

        Raises:
            GradInitError: `exact` products of a model with an operation without second derivative.
        """
        if self.second_order == "auto":
            dots, longer = (
                self._by_difference(batches, gradient, [v.clone() for v in vector], lengthening)
                for lengthening in (1.0, 2.0)
            )
            difference = float((dots - longer).norm() / dots.norm())
            trusted = difference <= AGREEMENT
            logger.info(
                "second-order products: %s (finite differences over two lengths differ by %.1f %%)",
                "finite differences" if trusted else "exact",
                100.0 * difference,
            )
            self.second_order = "finite-difference" if trusted else "exact"
            if trusted:
                return dots
        elif self.second_order == "finite-difference":
            return self._by_difference(batches, gradient, vector)
        gradient.by_parameter.clear()
        return self._weights.dots(self._exact(batches, gradient, vector))

    def _exact(
        self, batches: Sequence[Any], gradient: MeanGradient, vector: list[Tensor]
    ) -> list[Tensor]:
        """This process's part of H v by double backward: the derivative of <grad L, v>.

        The graph of `gradient`, if there is one, is used up instead of being made again.
        """

        def differentiate(batch: Any) -> None:
            first = gradient.graph.pop() if gradient.graph else None
            if first is None:
                first = self._gradients.differentiable(batch)[2]
            pairs = [(g, v) for g, v in zip(first, vector, strict=True) if g is not None]
            product = torch.stack([(g * v).sum() for g, v in pairs]).sum()
            # The graph does not need them any more, and they are as large as the model.
            del first, pairs
            if product.requires_grad:
                torch.autograd.backward(product)

        try:
            return self._gradients.of_each(batches, differentiate, gradient.count)
        except RuntimeError as error:
            raise GradInitError(
                "the model cannot be differentiated twice, which exact second-order products need "
                f"({said_by(error)}): set second-order to finite-difference"
            ) from error

    @torch.no_grad()
    def _by_difference(
        self,
        batches: Sequence[Any],
        gradient: MeanGradient,
        vector: list[Tensor],
        lengthening: float = 1.0,
    ) -> Tensor:
        """`by_scales` from (grad L(theta + e v) - grad L(theta)) / e: no second graph.

        The length e is in proportion to ||theta|| / ||v||, see `RELATIVE_LENGTH`, and rounded to
        a power of two: parameters that are equal, as fresh gains of normalisation layers are,
        would all round the same way after another step. `lengthening` is a factor on it.
        """
        size = global_norm(vector, 2)
        dtype = self._weights.parameters[0].dtype
        relative = RELATIVE_LENGTH[self._precision] * torch.finfo(dtype).eps ** 0.5
        wanted = relative * global_norm(self._weights.parameters, 2) / size
        length = torch.where(size > 0.0, torch.exp2(torch.log2(wanted).round()), 1.0).to(dtype)
        length = length * lengthening
        torch._foreach_mul_(vector, length)
        torch._foreach_add_(self._weights.parameters, vector)
        vector.clear()
        with torch.enable_grad():
            moved = self._gradients.of_mean(batches).by_parameter
        # `gradient` is the sum over the processes, of which each subtracts an equal part.
        torch._foreach_sub_(moved, gradient.by_parameter, alpha=1.0 / self._weights.processes.count)
        torch._foreach_div_(moved, length)
        dots = self._weights.dots(moved)
        self._weights.put()
        return dots
