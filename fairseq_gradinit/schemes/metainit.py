"""MetaInit: norms of weight matrices from which gradient descent would see a linear loss.

Dauphin and Schoenholz, "MetaInit: Initializing learning by learning to initialize", NeurIPS 2019.
With g the gradient of the loss and H its Hessian, the gradient quotient (equation 1)

    GQ = 1/N * sum_k |(g - H g)_k / (g_k + eps sign(g_k)) - 1|

is small where a step along g leaves g as it is. The norm of every matrix is moved against the sign
of GQ's derivative by it, with momentum (figure 2, from where the constants are). Vectors, such as
biases and gains, keep their norms.

The paper feeds random inputs with random labels. A Transformer's input is discrete, so these are
batches of the training data, with the loss that training has and without dropout.

With v = g, p = H v, a = dGQ/dg and b = dGQ/dp held constant, the derivative of GQ by the weights is
that of <a + H b, g> + <b, p>. Both g and p are sums over processes, and so is that derivative.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.gradients import LossFunction
from fairseq_gradinit.phase import data_parallel_processes, trained_modules
from fairseq_gradinit.processes import Processes
from fairseq_gradinit.quiet import quiet
from fairseq_gradinit.schemes.batches import training_batches
from fairseq_gradinit.task_loss import TaskLoss

logger = logging.getLogger("fairseq_gradinit")

ITERATIONS = 500


NOT_THRICE = (
    "metainit needs third derivatives, which this model does not have ({}): choose another "
    "--init-scheme"
)


@dataclass(frozen=True)
class MetaInitConfig:
    """The constants of the paper's figure 2.

    Attributes:
        lr: how far a norm moves in the first iteration, in units of the norm.
        momentum: the part of an iteration's move that the next one repeats.
        eps: keeps the quotient's denominator from zero, in nats per unit of weight.
        min_norm: smallest norm, as a part of the initial one. The paper has no bound; without one a
            small matrix passes through zero and changes its sign.
    """

    iterations: int = ITERATIONS
    lr: float = 0.1
    momentum: float = 0.9
    eps: float = 1e-5
    min_norm: float = 0.01


def initialise(trainer: Any, iterations: int) -> None:
    """Move the norms of the weight matrices of all that the trainer trains.

    Raises:
        GradInitError: the quotient is not finite, the model cannot be differentiated three times,
            or there are too few training data.
    """
    modules = list(trained_modules(trainer).values())
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    batches = (pair.first[0] for pair in training_batches(trainer))
    processes = data_parallel_processes(trainer)

    def report(iteration: int, quotient: float) -> None:
        if iteration % max(1, iterations // 10) == 0 or iteration == iterations:
            logger.info(
                "metainit: %d / %d, gradient quotient %.4f", iteration, iterations, quotient
            )

    with quiet(*modules):
        move_norms(
            parameters,
            TaskLoss(trainer),
            batches,
            MetaInitConfig(iterations),
            processes,
            report,
        )


def move_norms(
    parameters: Sequence[Tensor],
    loss: LossFunction,
    batches: Iterable[Any],
    config: MetaInitConfig,
    processes: Processes,
    report: Callable[[int, float], object] = lambda iteration, quotient: None,
) -> list[float]:
    """Descend the gradient quotient along the norms of the matrices among `parameters`.

    Args:
        parameters: all those that the gradient is taken by, of which tensors with two dimensions
            or more are matrices.
        batches: one for each iteration, this process's part of it.
        report: called with the iteration, from 1, and the quotient before it.

    Returns:
        The quotients.

    Raises:
        GradInitError: see `initialise`.
    """
    unique = list(dict.fromkeys(parameters))
    matrices = [i for i, p in enumerate(unique) if p.dim() >= 2 and bool(p.any())]
    lowest = [config.min_norm * unique[i].detach().norm().item() for i in matrices]
    speed = [0.0] * len(matrices)
    quotients: list[float] = []
    for iteration, batch in zip(range(1, config.iterations + 1), batches, strict=False):
        if iteration == 1:
            _require_visible(unique, loss, batch)
        quotient, slopes = quotient_and_slopes(unique, loss, batch, config.eps, processes)
        if not math.isfinite(quotient) or not bool(torch.isfinite(slopes).all()):
            raise GradInitError(
                f"metainit's gradient quotient is {quotient} in iteration {iteration}, or its "
                "derivative is not finite: choose another --init-scheme for this model"
            )
        quotients.append(quotient)
        report(iteration, quotient)
        with torch.no_grad():
            for j, i in enumerate(matrices):
                norm = unique[i].norm().item()
                speed[j] = config.momentum * speed[j] - config.lr * float(slopes[i].sign())
                unique[i].mul_(max(norm + speed[j], lowest[j]) / norm)
    return quotients


def quotient_and_slopes(
    parameters: Sequence[Tensor],
    loss: LossFunction,
    batch: Any,
    eps: float,
    processes: Processes,
) -> tuple[float, Tensor]:
    """The gradient quotient, and <dGQ/dW, W> for every parameter W.

    The latter is the norm of W times the derivative of GQ by it, shape (parameters,).

    Raises:
        GradInitError: the model cannot be differentiated three times.
    """
    # No fused attention kernel of torch has higher derivatives.
    with sdpa_kernel(SDPBackend.MATH), _PlainLayerNorm(), torch.enable_grad():
        total, count = loss(batch)
        size = torch.as_tensor(count, dtype=torch.float64, device=total.device).clone()
        processes.sum_([size])
        try:
            quotient, slopes = _differentiate(
                _Local(parameters, total / size.to(total.dtype)), eps, processes
            )
        except RuntimeError as error:
            raise GradInitError(NOT_THRICE.format(str(error).splitlines()[0])) from error
    processes.sum_([slopes])
    return quotient, slopes


def _require_visible(parameters: Sequence[Tensor], loss: LossFunction, batch: Any) -> None:
    """Refuse a model that hides parameters from torch.autograd.grad, where they count as unused.

    Raises:
        GradInitError: it does.
    """
    torch.autograd.backward(loss(batch)[0])
    used = [p.grad is not None for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        found = torch.autograd.grad(loss(batch)[0], parameters, allow_unused=True)
    except RuntimeError as error:
        raise GradInitError(NOT_THRICE.format(str(error).splitlines()[0])) from error
    if any(u and g is None for u, g in zip(used, found, strict=True)):
        raise GradInitError(
            NOT_THRICE.format("a part of it hides its parameters, as checkpointing does")
        )


class _PlainLayerNorm(TorchFunctionMode):
    """Has LayerNorm computed from elementary operations.

    torch's own has a second derivative, but that one takes mean and variance for constants, so the
    third would be wrong.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        called = _layer_norm if func is nn.functional.layer_norm else func
        return called(*args, **(kwargs or {}))


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    centered = x - x.mean(dims, keepdim=True)
    out = centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias


class _Local:
    """This process's part of the mean loss, to be differentiated several times."""

    def __init__(self, parameters: Sequence[Tensor], loss: Tensor) -> None:
        self.parameters = list(parameters)
        self.gradient = self.by_parameter(loss, again=True)

    def by_parameter(self, value: Tensor, again: bool) -> list[Tensor]:
        """The derivative of `value` by the parameters; `again` to differentiate that too."""
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in self.parameters]
        found = torch.autograd.grad(
            value, self.parameters, create_graph=again, retain_graph=True, allow_unused=True
        )
        return [
            torch.zeros_like(p) if d is None else d
            for p, d in zip(self.parameters, found, strict=True)
        ]

    def hessian_times(self, vector: Sequence[Tensor], again: bool = False) -> list[Tensor]:
        return self.by_parameter(_inner(self.gradient, vector), again)


def _differentiate(local: _Local, eps: float, processes: Processes) -> tuple[float, Tensor]:
    gradient = _summed(local.gradient, processes)
    local_product = local.hessian_times(gradient, again=True)
    product = _summed(local_product, processes)
    quotient, by_gradient, by_product = _quotient(gradient, product, eps)
    through = _summed(local.hessian_times(by_product), processes)
    torch._foreach_add_(through, by_gradient)
    value = _inner(local.gradient, through) + _inner(local_product, by_product)
    slopes = local.by_parameter(value, again=False)
    dots = [(s * p.detach()).sum() for s, p in zip(slopes, local.parameters, strict=True)]
    return quotient, torch.stack(dots)


def _quotient(
    gradient: Sequence[Tensor], product: Sequence[Tensor], eps: float
) -> tuple[float, list[Tensor], list[Tensor]]:
    """GQ, and its derivatives by g and by H g."""
    g = [t.requires_grad_() for t in gradient]
    p = [t.requires_grad_() for t in product]
    terms = []
    for one, other in zip(g, p, strict=True):
        shift = torch.where(one.detach() >= 0.0, eps, -eps)
        terms.append(((one - other) / (one + shift) - 1.0).abs().sum())
    quotient = torch.stack(terms).sum() / sum(t.numel() for t in g)
    found = torch.autograd.grad(quotient, [*g, *p])
    return quotient.item(), list(found[: len(g)]), list(found[len(g) :])


def _summed(tensors: Sequence[Tensor], processes: Processes) -> list[Tensor]:
    copies = [tensor.detach().clone() for tensor in tensors]
    processes.sum_(copies)
    return copies


def _inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()
