"""What an iteration descends: the loss after the trial step, or the norm of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.gradients import LossGradients, MeanGradient
from fairseq_gradinit.engine.hessian import HessianProducts
from fairseq_gradinit.engine.history import IterationKind
from fairseq_gradinit.engine.trial_step import first_step, norm_direction
from fairseq_gradinit.engine.weights import ScaledWeights


@dataclass(frozen=True)
class ScaleGradient:
    """What one iteration descends.

    Attributes:
        kind: which function of the scales it is the derivative of: the gradient norm
            (`constraint`), or the loss after the trial step over eta (`objective`).
        by_scales: the derivative, shape (learned blocks,).
        loss, trial_loss, norm: see `Iteration`; trial_loss is a tensor of shape ().
    """

    kind: IterationKind
    by_scales: Tensor
    loss: float
    trial_loss: Tensor | None
    norm: float


def objective(
    weights: ScaledWeights,
    gradients: LossGradients,
    config: GradInitConfig,
    batches: Sequence[Any],
    first: MeanGradient,
) -> tuple[Tensor, Tensor]:
    """d L(S~; theta_m - eta A[g_m]) / dm_i over eta, and L(S~) there; A[g_m] is a constant.

    Args:
        batches: S~.
        first: g_m, the sum over processes; it is used up.

    Returns:
        Shapes (learned blocks,) and ().
    """
    with torch.no_grad():
        step = first_step(first.by_parameter, config)
        torch._foreach_add_(weights.parameters, step, alpha=-config.eta)
    # They are as large as the model.
    first.by_parameter.clear()
    del step
    second = gradients.of_mean(batches)
    by_scales = weights.dots(second.by_parameter)
    weights.put()
    return by_scales / config.eta, second.loss


def constraint(
    products: HessianProducts,
    config: GradInitConfig,
    batches: Sequence[Any],
    first: MeanGradient,
    norm: Tensor,
) -> Tensor:
    """d||g||_p / dm_i = <H v, W_i>, with v the derivative of the norm by g; shape (learned,).

    Args:
        batches: S.
        first: g, the sum over processes; it is used up.
        norm: ||g||_p.
    """
    vector = norm_direction(first.by_parameter, norm, config.norm_order)
    return products.by_scales(batches, first, vector)
