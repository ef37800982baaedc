"""The residual branches of fairseq's Transformers, and how much each of them puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, cast

import torch
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.processes import Processes

LAYERS: dict[Literal["encoder", "decoder"], type[nn.Module]] = {
    "encoder": TransformerEncoderLayerBase,
    "decoder": TransformerDecoderLayerBase,
}


@dataclass(frozen=True)
class Branch:
    """One sublayer f of x + f(x).

    Attributes:
        layer: fairseq's layer that it belongs to.
        name: "self_attn", "encoder_attn" or "ffn".
        readers: the linear layers that read x. In attention to an encoder, only the queries do.
        queries_and_keys: those of attention; none of a feed-forward network.
        values: the linear layers that the output is linear in, up to ReLU: v_proj and out_proj, or
            fc1 and fc2. The output's scale is the product of theirs.
        norm: the LayerNorm of this sublayer: after the addition in a post-LN model.
    """

    layer: nn.Module
    name: str
    readers: tuple[nn.Linear, ...]
    queries_and_keys: tuple[nn.Linear, ...]
    values: tuple[nn.Linear, nn.Linear]
    norm: nn.Module

    @property
    def last(self) -> nn.Linear:
        """The layer whose output is f(x)."""
        return self.values[1]


@dataclass(frozen=True)
class Stack:
    """The layers of an encoder or of a decoder.

    Attributes:
        side: which of the two.
        branches: in the order of the forward pass.
    """

    side: Literal["encoder", "decoder"]
    branches: list[Branch]

    @property
    def layers(self) -> list[nn.Module]:
        """fairseq's layers, in the order of the forward pass."""
        return list(dict.fromkeys(branch.layer for branch in self.branches))


def stacks(model: nn.Module) -> list[Stack]:
    """Every encoder and every decoder of a model.

    Raises:
        GradInitError: the model has no layers of fairseq's Transformer.
    """
    found = stacks_by_name(model)
    if not found:
        raise GradInitError(
            f"--init-scheme needs layers of fairseq's Transformer, and {type(model).__name__} has "
            "none: choose another --arch, or leave --init-scheme out"
        )
    return list(found.values())


def stacks_by_name(model: nn.Module) -> dict[str, Stack]:
    """Every encoder and decoder by the place of its layers ("encoder.layers"); or none."""
    found: dict[str, Stack] = {}
    for name, module in model.named_modules():
        for side, kind in LAYERS.items():
            if isinstance(module, kind):
                stack = found.setdefault(name.rpartition(".")[0], Stack(side, []))
                stack.branches.extend(_branches(module))
    return found


def branch_names(layer: nn.Module) -> list[str]:
    """The names of a layer's branches, in the order of the forward pass."""
    return [branch.name for branch in _branches(layer)]


def _branches(layer: nn.Module) -> Iterator[Branch]:
    for name in ("self_attn", "encoder_attn"):
        attention = getattr(layer, name, None)
        if attention is None:
            continue
        keys_too = (attention.k_proj, attention.v_proj) if name == "self_attn" else ()
        yield Branch(
            layer,
            name,
            readers=(attention.q_proj, *keys_too),
            queries_and_keys=(attention.q_proj, attention.k_proj),
            values=(attention.v_proj, attention.out_proj),
            norm=getattr(layer, f"{name}_layer_norm"),
        )
    fc1, fc2 = layer.get_submodule("fc1"), layer.get_submodule("fc2")
    assert isinstance(fc1, nn.Linear)
    assert isinstance(fc2, nn.Linear)
    yield Branch(layer, "ffn", (fc1,), (), (fc1, fc2), layer.get_submodule("final_layer_norm"))


@torch.no_grad()
def variances(
    branches: Sequence[Branch],
    evaluate: Callable[[Any], object],
    batches: Sequence[Any],
    processes: Processes,
) -> list[tuple[float, float]]:
    """For each branch the variances of its x and f(x), over all elements of all tokens.

    Those of a branch that no batch passes through are nan. Call this inside `quiet`.

    Args:
        evaluate: runs the model on a batch.
        batches: the same ones in every process, which share them; without padding.
    """
    device = branches[0].last.weight.device
    # Of x and of f(x) of each branch: the count, the sum, and that of the squares.
    sums = torch.zeros(len(branches), 2, 3, dtype=torch.float64, device=device)
    with ExitStack() as watched:
        for branch, total in zip(branches, sums, strict=True):
            watched.enter_context(_watched(branch, total))
        for batch in batches[processes.rank :: processes.count]:
            evaluate(batch)
    processes.sum_([sums])
    mean, square = sums[..., 1] / sums[..., 0], sums[..., 2] / sums[..., 0]
    return [(x, output) for x, output in (square - mean**2).tolist()]


@contextmanager
def _watched(branch: Branch, sums: Tensor) -> Iterator[None]:
    """Adds the moments of x and f(x) of a branch to `sums` whenever the two are added."""
    own = vars(branch.layer)
    before = own.get("residual_connection")
    connect: Callable[[Tensor, Tensor], Tensor] = cast(Any, branch.layer).residual_connection
    names = cycle(branch_names(branch.layer))

    def connection(output: Tensor, x: Tensor) -> Tensor:
        if next(names) == branch.name:
            sums.add_(torch.stack([_moments(x), _moments(output)]))
        return connect(output, x)

    own["residual_connection"] = connection
    try:
        yield
    finally:
        del own["residual_connection"]
        if before is not None:
            own["residual_connection"] = before


def _moments(values: Tensor) -> Tensor:
    values = values.double()
    return torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])
