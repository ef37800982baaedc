"""LayerNorms whose outputs average to zero over the tokens.

What all tokens have in common in the input of a linear layer decides where its first updates go:
Adam moves every weight by the learning rate, and those of all tokens add up along their mean. With
positional embeddings and ReLU, nearly half of the power of a post-LN Transformer's activations is
such a common part at first. The bias of a LayerNorm, which starts at zero, can take it out; see
docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_gradinit.engine.processes import OneProcess, Processes
from fairseq_gradinit.errors import GradInitError


@torch.no_grad()
def center_layer_norms(
    modules: Sequence[nn.Module],
    evaluate: Callable[[Any], object],
    batches: Sequence[Any],
    processes: Processes | None = None,
    chosen: Callable[[nn.Parameter], bool] = lambda bias: True,
) -> int:
    """Set the bias of every LayerNorm to minus the mean of its output without bias.

    One after the other in the order of the forward pass, since each changes the input of the next.
    What the biases were before has no influence. Call this inside `deterministic`. It returns how
    many LayerNorms were centered.

    Args:
        modules: where to look for LayerNorms (by class name: torch's, fairseq's and apex's). Only
            those with a trainable bias that the first batch passes through are centered.
        evaluate: runs the model on a batch.
        batches: the same ones in every process; without padding, which would count as tokens.
        processes: share the work and end up with the same biases, bit for bit.
        chosen: whether a LayerNorm with this bias is centered.

    Raises:
        GradInitError: an output is not finite.
    """
    processes = processes or OneProcess()
    names = {m: name for root in modules for name, m in root.named_modules() if _is_layer_norm(m)}
    # In all processes the same, whatever their share of the batches.
    passed = dict.fromkeys(norm for norm, _ in _sums(names, evaluate, batches[0]))
    norms = [norm for norm in passed if chosen(norm.bias)]
    for norm in norms:
        norm.bias.zero_()
        total = torch.zeros(norm.bias.numel() + 1, dtype=torch.float64, device=norm.bias.device)
        for batch in batches[processes.rank :: processes.count]:
            for _, rows in _sums([norm], evaluate, batch):
                total += rows
        processes.sum_([total])
        norm.bias.copy_(-total[:-1] / total[-1])
        if not torch.isfinite(norm.bias).all():
            raise GradInitError(
                f"the output of {names[norm]} is not finite before training: check how the model "
                "initialises its parameters, and the data"
            )
    return len(norms)


def layer_norm_biases(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The biases that `center_layer_norms` sets."""
    found: list[Any] = [m.bias for root in modules for m in root.modules() if _is_layer_norm(m)]
    return found


def _sums(
    norms: Iterable[Any], evaluate: Callable[[Any], object], batch: Any
) -> list[tuple[Any, Tensor]]:
    """The sum of the rows of each output of `norms`, followed by their number, in order."""
    found: list[tuple[Any, Tensor]] = []

    def note(norm: Any, _: object, output: object) -> None:
        # A user's module of such a name may be something else, with states or several outputs.
        if isinstance(output, Tensor) and output.shape[-1:] == norm.bias.shape:
            rows = output.reshape(-1, output.shape[-1]).double()
            found.append((norm, torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])))

    handles = [norm.register_forward_hook(note) for norm in norms]
    try:
        evaluate(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_layer_norm(module: nn.Module) -> bool:
    bias = getattr(module, "bias", None)
    return (
        "layernorm" in type(module).__name__.lower()
        and isinstance(bias, nn.Parameter)
        and bias.dim() == 1
        and bias.requires_grad
    )
