"""The direction A[g] of an optimizer's first step, and the norm that measures g for it."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_gradinit.config import GradInitConfig


def first_step(gradients: list[Tensor], config: GradInitConfig) -> list[Tensor]:
    """A[g], so that the first step of the optimizer is -lr A[g]; differentiable in g."""
    if config.target == "adam":
        if config.eps == 0.0:
            return list(torch._foreach_sign(gradients))
        sizes = torch._foreach_add(torch._foreach_abs(gradients), config.eps)
        return list(torch._foreach_div(gradients, sizes))
    if config.target == "sgd-normalized":
        return _times(gradients, 1.0 / global_norm(gradients, 2))
    if config.clips:
        # The formula of torch.nn.utils.clip_grad_norm_, which training uses.
        factor = (config.clip_norm / (global_norm(gradients, 2) + 1e-6)).clamp(max=1.0)
        return _times(gradients, factor)
    return list(gradients)


def through_first_step(
    gradients: list[Tensor], cotangents: list[Tensor], config: GradInitConfig
) -> list[Tensor]:
    """J^T u, with J the Jacobian of A at g and u the `cotangents`."""
    with torch.enable_grad():
        leaves = [gradient.detach().requires_grad_() for gradient in gradients]
        steps = first_step(leaves, config)
        return list(torch.autograd.grad(steps, leaves, cotangents))


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
    # Not torch._foreach_mul, whose derivative by a tensor factor fails.
    return [tensor * factor.to(tensor.dtype) for tensor in tensors]
