"""Steps of training's own optimizer from its fresh state, for a trial of several steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer that training will begin with, with the settings of its first updates."""


class TrainingSteps:
    """Moves parameters as training's first updates would.

    Args:
        parameters: the trainable ones.
        make: see `MakeOptimizer`; called once.
        lr: learning rate of each step, in place of the optimizer's own.
        clip_norm: bound on the l2 norm of the gradient; `math.inf` for none.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        make: MakeOptimizer,
        lr: float,
        clip_norm: float = math.inf,
    ) -> None:
        self._parameters = list(parameters)
        self._clip_norm = clip_norm
        self._optimizer = make(self._parameters)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._fresh = copy.deepcopy(self._optimizer.state_dict())

    def restart(self) -> None:
        """Forget the steps made so far."""
        self._optimizer.load_state_dict(copy.deepcopy(self._fresh))

    @torch.no_grad()
    def __call__(self, gradient: Sequence[Tensor]) -> None:
        """Make one step from the gradient of each parameter, which may be overwritten."""
        for parameter, part in zip(self._parameters, gradient, strict=True):
            parameter.grad = part
        if math.isfinite(self._clip_norm):
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
