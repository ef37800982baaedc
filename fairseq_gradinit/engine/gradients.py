"""Gradients of the mean loss of a batch that several processes and micro-batches make up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairseq_gradinit.engine.config import Precision
from fairseq_gradinit.engine.processes import Processes
from fairseq_gradinit.errors import GradInitError, said_by

logger = logging.getLogger(__name__)

LossFunction = Callable[[Any], tuple[Tensor, Tensor | float]]
"""Maps a batch to (the sum of its losses, a scalar tensor; the count to divide it by)."""

Halve = Callable[[Any], Sequence[Any]]
"""Cuts a batch in two whose summed losses and counts add up to its own; [] if it cannot be cut."""


@dataclass(frozen=True)
class MeanGradient:
    """The mean loss of a batch and its gradient.

    Attributes:
        loss: mean loss over all processes, shape ().
        count: what the summed loss was divided by, over all processes, shape ().
        by_parameter: the gradient, or this process's part of it, one tensor for each parameter.
        used: whether this process's part depends on the parameter at all, for each of them.
        graph: empty, or this process's part before the division by `count` as tensors that can
            be differentiated again (None for a parameter that is not used), as the only item.
    """

    loss: Tensor
    count: Tensor
    by_parameter: list[Tensor]
    used: list[bool]
    graph: list[Sequence[Tensor | None]] = field(default_factory=list)


class LossGradients:
    """Takes gradients of a loss by the parameters, one micro-batch after the other.

    The `grad` of the parameters is work space, and None between calls.

    Args:
        parameters: all of one type and on one device.
        loss: see `LossFunction`.
        precision: of the evaluation of the loss.
        processes: those that share each batch.
        halve: how to cut a batch that does not fit in the memory of a GPU.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        loss: LossFunction,
        precision: Precision,
        processes: Processes,
        halve: Halve | None = None,
    ) -> None:
        self._parameters = list(parameters)
        self._loss = loss
        self._precision = precision
        self._processes = processes
        self._halve = halve
        self._halvings = 0

    def evaluate(self, batch: Any) -> tuple[Tensor, Tensor | float]:
        """The summed loss and the count of one micro-batch, in the precision asked for."""
        # The cache of autocast would keep casts of weights that have moved in the meantime.
        with torch.autocast(
            self._parameters[0].device.type,
            dtype=torch.bfloat16,
            enabled=self._precision == "bf16",
            cache_enabled=False,
        ):
            return self._loss(batch)

    def of_mean(self, batches: Sequence[Any], keep_graph: bool = False) -> MeanGradient:
        """The mean loss, and this process's part of its gradient: the parts add up to it.

        Args:
            batches: this process's micro-batches, none being a share of nothing.
            keep_graph: keep the gradient's graph too, if there is one micro-batch and it fits.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self._parameters[0].device)
        graph: list[Sequence[Tensor | None]] = []

        def differentiate(batch: Any) -> None:
            if keep_graph and len(batches) == 1 and self._halvings == 0:
                loss, size, gradients = self.differentiable(batch)
                graph[:] = [gradients]
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    parameter.grad = None if gradient is None else gradient.detach().clone()
            else:
                loss, size = self.evaluate(batch)
                torch.autograd.backward(loss)
            totals[0] += loss.detach()
            totals[1] += size

        def reset() -> None:
            totals.zero_()
            graph.clear()

        self._accumulate(batches, differentiate, reset)
        self._processes.sum_([totals])
        used = [parameter.grad is not None for parameter in self._parameters]
        return MeanGradient(totals[0] / totals[1], totals[1], self.take(totals[1]), used, graph)

    def differentiable(self, batch: Any) -> tuple[Tensor, Tensor | float, Sequence[Tensor | None]]:
        """The summed loss, the count, and a gradient of the loss that has a gradient itself."""
        # No fused attention kernel of torch has a second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            loss, size = self.evaluate(batch)
        gradients = torch.autograd.grad(
            loss, self._parameters, create_graph=True, allow_unused=True
        )
        return loss, size, gradients

    def of_each(
        self, batches: Sequence[Any], differentiate: Callable[[Any], None], count: Tensor
    ) -> list[Tensor]:
        """What `differentiate` accumulates in the parameters' `grad`, divided by `count`."""
        self._accumulate(batches, differentiate, lambda: None)
        return self.take(count)

    def take(self, count: Tensor) -> list[Tensor]:
        """Move the accumulated gradients out of the parameters, divided by `count`."""
        gradients = [self._dense(p) for p in self._parameters]
        self._drop()
        torch._foreach_div_(gradients, count.to(gradients[0].dtype))
        return gradients

    @staticmethod
    def _dense(parameter: Tensor) -> Tensor:
        if parameter.grad is None:
            return torch.zeros_like(parameter)
        gradient = parameter.grad.detach()
        return gradient.to_dense() if gradient.is_sparse else gradient

    def _drop(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _accumulate(
        self, batches: Sequence[Any], differentiate: Callable[[Any], None], reset: Callable[[], Any]
    ) -> None:
        """Call `differentiate` on every batch; start over with halves when memory runs out."""
        while True:
            try:
                with torch.autocast(self._parameters[0].device.type, enabled=False):
                    for batch in batches:
                        for piece in self._pieces(batch, self._halvings):
                            differentiate(piece)
                return
            except torch.OutOfMemoryError as error:
                message = said_by(error)
            # Outside of the handler, where the error no longer keeps what was computed alive.
            self._drop()
            reset()
            self._require_halves(batches, message)
            self._halvings += 1
            logger.warning(
                "out of memory: GradInit goes on with each micro-batch in %d parts",
                2**self._halvings,
            )
            if self._parameters[0].is_cuda:
                torch.cuda.empty_cache()

    def _pieces(self, batch: Any, halvings: int) -> list[Any]:
        if halvings == 0 or self._halve is None:
            return [batch]
        halves = self._halve(batch)
        if len(halves) < 2:
            return [batch]
        return [piece for half in halves for piece in self._pieces(half, halvings - 1)]

    def _require_halves(self, batches: Sequence[Any], message: str) -> None:
        """Raise unless one more halving would make smaller pieces."""
        count = [
            sum(len(self._pieces(batch, halvings)) for batch in batches)
            for halvings in (self._halvings, self._halvings + 1)
        ]
        if count[1] == count[0]:
            raise GradInitError(
                f"out of memory in GradInit, with batches that cannot be cut any further: use "
                f"smaller batches ({message})"
            )
