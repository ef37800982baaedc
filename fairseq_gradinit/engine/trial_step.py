"""The direction A[g] of an optimizer's first step, and the norm that measures g for it."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_gradinit.engine.config import GradInitConfig


def first_step(gradients: list[Tensor], config: GradInitConfig) -> list[Tensor]:
    """A[g], so that the first step of the optimizer is -lr A[g]."""
    if config.target == "adam":
        return list(torch._foreach_sign(gradients))
    if config.target == "sgd-normalized":
        return _times(gradients, 1.0 / global_norm(gradients, 2))
    if config.clips:
        # The formula of torch.nn.utils.clip_grad_norm_, which training uses.
        factor = (config.clip_norm / (global_norm(gradients, 2) + 1e-6)).clamp(max=1.0)
        return _times(gradients, factor)
    return list(gradients)


def norm_direction(gradients: list[Tensor], norm: Tensor, order: int) -> list[Tensor]:
    """The derivative of ||g||_p by g: sign(g) for p = 1, g / ||g||_2 for p = 2."""
    if order == 1:
        return list(torch._foreach_sign(gradients))
    return _times(gradients, 1.0 / norm)


def global_norm(tensors: list[Tensor], order: int) -> Tensor:
    """||.||_p over all `tensors` together; shape (), float64."""
    norms = torch.stack(torch._foreach_norm(tensors, order)).double()
    norm: Tensor = torch.linalg.vector_norm(norms, order)
    return norm


def _times(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    return list(torch._foreach_mul(tensors, factor.to(tensors[0].dtype)))
