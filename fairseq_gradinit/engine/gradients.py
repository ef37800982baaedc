"""Gradients of the mean loss of a batch that several processes and micro-batches make up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        loss, count: mean loss and what it was divided by, over all processes; shape ().
        by_parameter: the gradient, or this process's part of it, one tensor for each parameter.
        graph: empty, or this process's part before the division by `count` as tensors that can
            be differentiated again (None for a parameter that is not used), as the only item.
    """

    loss: Tensor
    count: Tensor
    by_parameter: list[Tensor]
    graph: list[Sequence[Tensor | None]]


class LossGradients:
    """Takes gradients of a loss by the parameters, one micro-batch after the other.

    The `grad` of the parameters, all of one type and device, is work space: None between calls.
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
        self._device = self._parameters[0].device
        self._loss = loss
        self._precision = precision
        self._processes = processes
        self._halve = halve
        self._halvings = 0

    def of_mean(self, batches: Sequence[Any], keep_graph: bool = False) -> MeanGradient:
        """The mean loss, and this process's part of its gradient: the parts add up to it.

        `batches` are this process's micro-batches. With `keep_graph` the gradient's graph is kept
        too, if there is one micro-batch and it fits.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self._device)
        graph: list[Sequence[Tensor | None]] = []

        def differentiate(batch: Any) -> None:
            if keep_graph and len(batches) == 1 and self._halvings == 0:
                loss, size, gradients = self.differentiable(batch)
                graph.append(gradients)
                for parameter, gradient in zip(self._parameters, gradients, strict=True):
                    parameter.grad = None if gradient is None else gradient.detach().clone()
            else:
                loss, size = self._evaluate(batch)
                torch.autograd.backward(loss)
            totals[0] += loss.detach()
            totals[1] += size

        def reset() -> None:
            totals.zero_()
            graph.clear()

        self._accumulate(batches, differentiate, reset)
        self._processes.sum_([totals])
        return MeanGradient(totals[0] / totals[1], totals[1], self._take(totals[1]), graph)

    def differentiable(self, batch: Any) -> tuple[Tensor, Tensor | float, Sequence[Tensor | None]]:
        """The summed loss, the count, and a gradient of the loss that has a gradient itself."""
        # No fused attention kernel of torch has a second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            loss, size = self._evaluate(batch)
        gradients = torch.autograd.grad(
            loss, self._parameters, create_graph=True, allow_unused=True
        )
        return loss, size, gradients

    def of_each(
        self, batches: Sequence[Any], differentiate: Callable[[Any], None], count: Tensor
    ) -> list[Tensor]:
        """What `differentiate` accumulates in the parameters' `grad`, divided by `count`."""
        self._accumulate(batches, differentiate, lambda: None)
        return self._take(count)

    def _evaluate(self, batch: Any) -> tuple[Tensor, Tensor | float]:
        # The cache of autocast would keep casts of weights that have moved in the meantime.
        with torch.autocast(
            self._device.type,
            dtype=torch.bfloat16,
            enabled=self._precision == "bf16",
            cache_enabled=False,
        ):
            return self._loss(batch)

    def _take(self, count: Tensor) -> list[Tensor]:
        """Move the accumulated gradients out of the parameters, divided by `count`."""
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self._parameters
        ]
        gradients = [g.to_dense() if g.is_sparse else g for g in gradients]
        for parameter in self._parameters:
            parameter.grad = None
        torch._foreach_div_(gradients, count.to(gradients[0].dtype))
        return gradients

    def _accumulate(
        self, batches: Sequence[Any], differentiate: Callable[[Any], None], reset: Callable[[], Any]
    ) -> None:
        """Call `differentiate` on every batch; start over with halves when memory runs out.

        Raises:
            GradInitError: no batch can be cut any further.
        """
        while True:
            pieces = self._pieces(batches, self._halvings)
            try:
                with torch.autocast(self._device.type, enabled=False):
                    for piece in pieces:
                        differentiate(piece)
                return
            except torch.OutOfMemoryError as error:
                message = said_by(error)
            # Outside of the handler, where the error no longer keeps what was computed alive.
            for parameter in self._parameters:
                parameter.grad = None
            reset()
            self._halvings += 1
            if len(self._pieces(batches, self._halvings)) == len(pieces):
                raise GradInitError(
                    "out of memory in GradInit, with batches that cannot be cut any further: use "
                    f"smaller batches ({message})"
                )
            logger.warning(
                "out of memory: GradInit goes on with each micro-batch in %d parts",
                2**self._halvings,
            )
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _pieces(self, batches: Sequence[Any], halvings: int) -> list[Any]:
        if halvings == 0 or self._halve is None:
            return list(batches)
        halves = [self._halve(batch) or [batch] for batch in batches]
        return self._pieces([half for pair in halves for half in pair], halvings - 1)
