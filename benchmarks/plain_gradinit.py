"""GradInit as a direct reading of the paper's algorithm 1: the baseline of the cost benchmark.

It differs from `fairseq_gradinit.engine` in how it computes, not in what: the gradient of S
is always taken with a graph of its own, as if the constraint were violated each time, and that
graph lives to the end of the iteration. The authors' code does the same. Without fused attention,
which has no second derivative; one process, one micro-batch, no checks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairseq_gradinit.engine import (
    BatchPair,
    Block,
    GradInitConfig,
    LossFunction,
    base_weights,
    set_weights,
)


class PlainGradInit:
    """Learns the scales for the target `adam`, one iteration at a time.

    Attributes:
        scales: of the learned blocks, shape (learned blocks,).
        kinds: of the iterations done so far.
    """

    def __init__(self, blocks: list[Block], loss: LossFunction, config: GradInitConfig) -> None:
        self._blocks = blocks
        self._loss = loss
        self._config = config
        self._base = base_weights(blocks)
        self._parameters = [block.parameter for block in blocks]
        self.scales = torch.ones(sum(b.learned for b in blocks), dtype=torch.float64)
        self._adam = {
            kind: torch.optim.Adam([self.scales], lr=config.lr, betas=config.betas)
            for kind in ("objective", "constraint")
        }
        self.kinds: list[str] = []

    def step(self, pair: BatchPair) -> None:
        """Do one iteration."""
        with sdpa_kernel(SDPBackend.MATH):
            gradients = torch.autograd.grad(
                self._mean_loss(pair.first[0]), self._parameters, create_graph=True
            )
            norm = torch.stack([g.abs().sum() for g in gradients]).sum()
            if norm.item() > self._config.gamma:
                norm.backward()
                self._descend("constraint", divisor=1.0)
            else:
                with torch.no_grad():
                    for parameter, gradient in zip(self._parameters, gradients, strict=True):
                        parameter -= self._config.eta * gradient.sign()
                self._mean_loss(pair.second[0]).backward()
                self._descend("objective", divisor=self._config.eta)

    def _mean_loss(self, batch: object) -> Tensor:
        loss, count = self._loss(batch)
        return loss / count

    @torch.no_grad()
    def _descend(self, kind: str, divisor: float) -> None:
        """Move the scales along the gradients that the parameters hold, and set the weights."""
        dots = [
            (block.parameter.grad * base).sum().double() / divisor
            for block, base in zip(self._blocks, self._base, strict=True)
            if block.learned
        ]
        self.scales.grad = torch.stack(dots)
        self._adam[kind].step()
        self.scales.clamp_(self._config.min_scale, self._config.max_scale)
        for parameter in self._parameters:
            parameter.grad = None
        set_weights(self._blocks, self._base, self.scales)
        self.kinds.append(kind)
