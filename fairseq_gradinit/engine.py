"""GradInit's optimisation of the scales: plain PyTorch, any model, any loss.

Implements algorithm 1 of Zhu et al., "GradInit: Learning to Initialize Neural Networks for Stable
and Efficient Training" (NeurIPS 2021, arXiv:2102.08098):

    minimise over m   L(S~; theta_m - eta A[g_m])
    with              theta_m = {m_i W_i},  g_m = grad L(S; theta_m)
    subject to        ||g_m||_p <= gamma,  min_scale <= m_i <= max_scale

An iteration first takes the first-order gradient g_m. Only when its norm exceeds gamma does it pay
for a second-order product, to descend the norm; otherwise it takes the trial step, and descends
the loss after it. The derivative of the trial step's direction is taken as zero: exact for Adam,
whose first step is sign(g), and the paper's choice for SGD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairseq_gradinit.blocks import Block, base_weights, set_weights
from fairseq_gradinit.config import GradInitConfig
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.processes import OneProcess, Processes

IterationKind = Literal["objective", "constraint"]

LossFunction = Callable[[Any], tuple[Tensor, Tensor | float]]
"""Maps a batch to (the sum of its losses, a scalar tensor; the count to divide it by)."""


@dataclass(frozen=True)
class BatchPair:
    """The data of one iteration: the batches S and S~, each as this process's micro-batches.

    S and S~ should share half of their examples: independent batches make the scales chase
    noise, identical ones overfit the step (section 3.3).
    """

    first: Sequence[Any]
    second: Sequence[Any]


@dataclass(frozen=True)
class Iteration:
    """What one iteration did. Losses are in the units of the loss function, per count.

    Attributes:
        index: from 1.
        kind: `constraint` when the gradient norm exceeded gamma, else `objective`.
        loss: L(S) at the scales before this iteration.
        trial_loss: L(S~) after the trial step; None in a constraint iteration.
        grad_norm: ||g||_p over all blocks together.
        min_scale, max_scale: range of the learned scales after this iteration.
    """

    index: int
    kind: IterationKind
    loss: float
    trial_loss: float | None
    grad_norm: float
    min_scale: float
    max_scale: float


@dataclass(frozen=True)
class ScaleGradient:
    """What one iteration descends.

    Attributes:
        kind: which function of the scales it is the derivative of: the gradient norm
            (`constraint`), or the loss after the trial step over eta (`objective`).
        by_scales: the derivative, shape (learned blocks,).
        loss, trial_loss, norm: see `Iteration`.
    """

    kind: IterationKind
    by_scales: Tensor
    loss: float
    trial_loss: float | None
    norm: float


class ScaleLearner:
    """Learns one scale per learned block, one iteration at a time.

    The parameters hold m_i W_i between iterations. Gradients of the parameters are used as work
    space and are None between iterations.

    Args:
        blocks: see `fairseq_gradinit.blocks.collect_blocks`.
        loss: the training loss, with everything stochastic switched off (`quiet`).
        config: the settings.
        processes: those that share each batch, every one of them with a learner of its own.

    Raises:
        GradInitError: the processes hold different weights.
    """

    def __init__(
        self,
        blocks: list[Block],
        loss: LossFunction,
        config: GradInitConfig,
        processes: Processes | None = None,
    ) -> None:
        self.blocks = blocks
        self._processes = processes or OneProcess()
        self.config = config
        self._loss = loss
        self._parameters: list[Tensor] = [block.parameter for block in blocks]
        self._learned = [i for i, block in enumerate(blocks) if block.learned]
        self._base = base_weights(blocks)
        device = self._parameters[self._learned[0]].device
        self.scales = torch.ones(
            len(self._learned), dtype=torch.float64, device=device, requires_grad=True
        )
        learned = [blocks[i] for i in self._learned]
        self._lower = torch.tensor(
            [config.min_bias_scale if b.is_bias else config.min_scale for b in learned],
            dtype=torch.float64,
            device=device,
        )
        self._upper = torch.full_like(self._lower, config.max_scale)
        # One Adam for each kind of iteration: their gradients differ by orders of magnitude, and
        # shared moments would let one kind decide the step of the other.
        kinds: tuple[IterationKind, ...] = ("objective", "constraint")
        self._adam = {
            kind: torch.optim.Adam([self.scales], lr=config.lr, betas=config.betas)
            for kind in kinds
        }
        self.iterations_done = 0
        sums = [self._base[i].double().sum() for i in self._learned]
        self._require_same("initial weights", torch.stack(sums))

    def gradient(self, pair: BatchPair) -> ScaleGradient:
        """The derivative to descend at the present scales; leaves the weights as they were.

        Raises:
            GradInitError: the loss or the gradient norm is not finite, or a batch counts nothing.
        """
        loss, count = self._backward(pair.first)
        gradients = self._take_gradients(count)
        for gradient in gradients:
            # Its sign and its norm are those of the sum, not sums of signs and norms.
            self._processes.sum_(gradient)
        loss_value, norm = torch.stack([loss / count, self._norm(gradients)]).tolist()
        self._check_finite("loss", loss_value)
        self._check_finite("gradient norm", norm)
        if norm > self.config.gamma:
            by_scales = self._constraint_gradient(pair.first, gradients, norm, count)
            return ScaleGradient("constraint", by_scales, loss_value, None, norm)
        self._trial_step(gradients, norm)
        trial_loss, count = self._backward(pair.second)
        by_scales = self._dot_base(self._take_gradients(count)) / self.config.eta
        set_weights(self.blocks, self._base, self.scales)
        trial_value = (trial_loss / count).item()
        self._check_finite("loss after the trial step", trial_value)
        return ScaleGradient("objective", by_scales, loss_value, trial_value, norm)

    def step(self, pair: BatchPair) -> Iteration:
        """Do one iteration: descend `gradient(pair)` by Adam, keep the scales in their bounds.

        Raises:
            GradInitError: see `gradient`.
        """
        found = self.gradient(pair)
        self._check_finite("gradient of the scales", found.by_scales.norm().item())
        self.scales.grad = found.by_scales
        self._adam[found.kind].step()
        self.scales.grad = None
        with torch.no_grad():
            self.scales.clamp_(self._lower, self._upper)
            low, high = torch.stack(torch.aminmax(self.scales)).tolist()
        self._require_same("scales", self.scales.detach())
        set_weights(self.blocks, self._base, self.scales)
        self.iterations_done += 1
        return Iteration(
            index=self.iterations_done,
            kind=found.kind,
            loss=found.loss,
            trial_loss=found.trial_loss,
            grad_norm=found.norm,
            min_scale=low,
            max_scale=high,
        )

    def restore(self) -> None:
        """Put the initial weights W_i back into the model."""
        for parameter in self._parameters:
            parameter.grad = None
        set_weights(self.blocks, self._base, torch.ones_like(self.scales))

    def scale_of(self) -> dict[str, float]:
        """The scale of every block by name; blocks that are not learned have scale 1."""
        learned = iter(self.scales.tolist())
        return {block.name: next(learned) if block.learned else 1.0 for block in self.blocks}

    def _backward(self, batches: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of the loss of this process's `batches`.

        Returns:
            The summed loss and the count, over all processes.
        """
        totals = torch.zeros(2, dtype=torch.float64, device=self.scales.device)
        for batch in batches:
            loss, size = self._loss(batch)
            torch.autograd.backward(loss)
            totals[0] += loss.detach()
            totals[1] += size
        self._processes.sum_(totals)
        return totals[0], totals[1]

    def _take_gradients(self, count: Tensor) -> list[Tensor]:
        """Move this process's accumulated gradients out of the parameters, divided by `count`."""
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self._parameters
        ]
        for parameter in self._parameters:
            parameter.grad = None
        divisor = float(count)
        if not divisor > 0.0:
            raise GradInitError(
                f"a batch of GradInit counts {divisor} items to average the loss over: "
                "the sample size that the criterion returns must be greater than 0"
            )
        torch._foreach_div_(gradients, divisor)
        return gradients

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        norms = torch._foreach_norm(gradients, self.config.norm_order)
        norm: Tensor = torch.stack(norms).double().norm(self.config.norm_order)
        return norm

    @torch.no_grad()
    def _trial_step(self, gradients: list[Tensor], norm: float) -> None:
        """theta <- theta - eta A[g], in place, for every block; overwrites `gradients`."""
        step = self.config.eta
        if self.config.target == "adam":
            torch._foreach_sign_(gradients)
        elif self.config.target == "sgd-normalized":
            step = step / norm if norm > 0.0 else 0.0
        torch._foreach_add_(self._parameters, gradients, alpha=-step)

    def _constraint_gradient(
        self, batches: Sequence[Any], gradients: list[Tensor], norm: float, count: Tensor
    ) -> Tensor:
        """d||g||_p / dm_i = <H v, W_i>, with v = sign(g) for p = 1 and g / ||g|| for p = 2."""
        if self.config.norm_order == 1:
            torch._foreach_sign_(gradients)
        else:
            torch._foreach_div_(gradients, norm)
        return self._dot_base(self._hessian_vector_product(batches, gradients, count))

    def _hessian_vector_product(
        self, batches: Sequence[Any], vector: list[Tensor], count: Tensor
    ) -> list[Tensor]:
        """H v by double backward, H being the Hessian of the mean loss of `batches`."""
        for batch in batches:
            # No fused attention kernel of torch has a second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                loss, _ = self._loss(batch)
                first = torch.autograd.grad(
                    loss, self._parameters, create_graph=True, allow_unused=True
                )
                pairs = [(g, v) for g, v in zip(first, vector, strict=True) if g is not None]
                product = torch.stack([(g * v).sum() for g, v in pairs]).sum()
                if product.requires_grad:
                    torch.autograd.backward(product)
        return self._take_gradients(count)

    def _dot_base(self, tensors: list[Tensor]) -> Tensor:
        """<t_i, W_i> of every learned block, t_i being the sum over processes; shape (learned,)."""
        dots = torch.stack(
            [torch.dot(tensors[i].flatten(), self._base[i].flatten()) for i in self._learned]
        ).double()
        self._processes.sum_(dots)
        return dots

    def _require_same(self, what: str, values: Tensor) -> None:
        """Refuse values of the learned blocks, shape (learned,), that processes differ in."""
        extremes = torch.cat([values, -values])
        self._processes.max_(extremes)
        highest, lowest = extremes[: len(values)], -extremes[len(values) :]
        differ = (highest != lowest).nonzero().flatten().tolist()
        if differ:
            raise GradInitError(
                f"the processes have different {what}, first for "
                f"{self.blocks[self._learned[differ[0]]].name}: start all of them with the same "
                "command and seed"
            )

    def _check_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        iteration = self.iterations_done + 1
        sizes = torch.stack(torch._foreach_norm(self._parameters, math.inf))
        largest = self.blocks[int(sizes.nan_to_num(nan=math.inf).argmax())].name
        advice = "lower eta, the learning rate of the scales, or max-scale"
        if iteration == 1 and what == "loss":
            advice = "the model has no finite loss at its own initialisation: check data and model"
        raise GradInitError(
            f"the {what} is {value} in GradInit iteration {iteration} (the largest weight is in "
            f"{largest}): {advice}"
        )


def learn_scales(
    blocks: list[Block],
    loss: LossFunction,
    pairs: Iterable[BatchPair],
    config: GradInitConfig,
    on_iteration: Callable[[Iteration], None] = lambda iteration: None,
    processes: Processes | None = None,
) -> tuple[dict[str, float], list[Iteration]]:
    """Learn the scales and leave the model with its weights scaled.

    Args:
        blocks: the parameter tensors, from `collect_blocks`.
        loss: the training loss of a batch as (sum, count); call this inside `quiet`.
        pairs: at least `config.iterations` pairs of batches.
        config: the settings.
        on_iteration: called after every iteration.
        processes: those that share each batch; each of them must call this function.

    Returns:
        The scale of every block by name, and the record of the iterations.

    Raises:
        GradInitError: a loss or gradient is not finite, or `pairs` ended early. The model then
            has its initial weights again.
    """
    learner = ScaleLearner(blocks, loss, config, processes)
    history: list[Iteration] = []
    try:
        for pair in pairs:
            history.append(learner.step(pair))
            on_iteration(history[-1])
            if len(history) == config.iterations:
                return learner.scale_of(), history
    except BaseException:
        learner.restore()
        raise
    learner.restore()
    raise GradInitError(
        f"the batches for GradInit ended after {len(history)} of {config.iterations} iterations"
    )
