"""The residual branches of fairseq's Transformers, how much each puts out, and their shortcuts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, cast
from unittest.mock import patch

import torch
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from fairseq_gradinit.engine import Block, Processes
from fairseq_gradinit.scales import Snapshot

LAYERS: dict[Literal["encoder", "decoder"], type[nn.Module]] = {
    "encoder": TransformerEncoderLayerBase,
    "decoder": TransformerDecoderLayerBase,
}


@dataclass(frozen=True)
class Branch:
    """One sublayer f of x + f(x).

    Its `name` is "self_attn", "encoder_attn" or "ffn"; `layer_name` is that of the model.
    """

    layer: nn.Module
    layer_name: str
    name: str

    @property
    def queries_and_keys(self) -> list[nn.Linear]:
        """Those of attention; none of a feed-forward network."""
        attention: Any = None if self.name == "ffn" else self.layer.get_submodule(self.name)
        return [] if attention is None else [attention.q_proj, attention.k_proj]

    @property
    def values(self) -> list[nn.Linear]:
        """The output is linear in both, up to ReLU; the second puts out f(x)."""
        part: Any = self.layer if self.name == "ffn" else self.layer.get_submodule(self.name)
        return [part.fc1, part.fc2] if self.name == "ffn" else [part.v_proj, part.out_proj]


@dataclass(frozen=True)
class Stack:
    """The layers of an encoder or of a decoder, and their branches in the order of the forward."""

    side: Literal["encoder", "decoder"]
    layers: list[nn.Module] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)


def stacks(model: nn.Module) -> list[Stack]:
    """Every encoder and every decoder of a model that has layers of fairseq's Transformer."""
    found: dict[str, Stack] = {}
    for name, module in model.named_modules():
        for side, kind in LAYERS.items():
            if isinstance(module, kind):
                stack = found.setdefault(name.rpartition(".")[0], Stack(side))
                stack.layers.append(module)
                stack.branches.extend(Branch(module, name, b) for b in branch_names(module))
    return list(found.values())


def branch_names(layer: nn.Module) -> list[str]:
    """The names of a layer's branches, in the order of the forward pass."""
    attention = ("self_attn", "encoder_attn")
    return [*(name for name in attention if getattr(layer, name, None) is not None), "ffn"]


@torch.no_grad()
def variances(
    branches: Sequence[Branch],
    evaluate: Callable[[Any], object],
    batches: Sequence[Any],
    processes: Processes,
) -> list[tuple[float, float]]:
    """For each branch the variances of its x and f(x), over all elements of all tokens.

    They are nan for a branch whose layer does not call its `residual_connection` for it. Call this
    inside `deterministic`. `evaluate` runs the model on one of the `batches`, which are the same
    ones in every process, shared by them, and without padding.
    """
    weights = (p for branch in branches for p in branch.layer.parameters())
    device = next(weights, torch.empty(0)).device
    # Of x and of f(x) of each branch: the count, the sum, and that of the squares.
    sums = torch.zeros(len(branches), 2, 3, dtype=torch.float64, device=device)
    with ExitStack() as watched:
        for branch, total in zip(branches, sums, strict=True):
            watching = {"residual_connection": _watching(branch, total)}
            # A method of the layer's class, or weighted shortcuts in its own attributes.
            watched.enter_context(patch.dict(vars(branch.layer), watching))
        for batch in batches[processes.rank :: processes.count]:
            evaluate(batch)
    processes.sum_([sums])
    mean, square = sums[..., 1] / sums[..., 0], sums[..., 2] / sums[..., 0]
    return [(x, output) for x, output in (square - mean**2).tolist()]


def _watching(branch: Branch, sums: Tensor) -> Callable[..., Tensor]:
    """The layer's residual connection, which adds the moments of this branch to `sums`."""
    connect: Callable[..., Tensor] = cast(Any, branch.layer).residual_connection
    names = branch_names(branch.layer)
    calls = count()

    def connection(*values: Any, **named: Any) -> Tensor:
        if names[next(calls) % len(names)] == branch.name:
            output, x = [*values, *named.values()][:2]
            sums.add_(torch.stack([_moments(x), _moments(output)]))
        return connect(*values, **named)

    return connection


def _moments(values: Tensor) -> Tensor:
    values = values.double()
    return torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])


def take_snapshot(
    model: nn.Module,
    blocks: Sequence[Block],
    evaluate: Callable[[Any], object],
    batches: Sequence[Any],
    processes: Processes,
) -> Snapshot:
    """Measure what `Effect` describes. Call this inside `deterministic`; arguments as `variances`.

    The share of a branch is nan where its variances are.
    """
    norms = torch.stack([block.parameter.detach().double().norm() for block in blocks]).tolist()
    branches = [branch for stack in stacks(model) for branch in stack.branches]
    measured = variances(branches, evaluate, batches, processes) if branches else []
    shares = {
        f"{branch.layer_name}.{branch.name}": output / (x + output) if x + output else 0.0
        for branch, (x, output) in zip(branches, measured, strict=True)
    }
    return Snapshot(dict(zip([block.name for block in blocks], norms, strict=True)), shares)


class Shortcuts(nn.Module):
    """Weights w of one layer's w x + f(x), in the place of fairseq's `residual_connection`.

    Each branch has a copy of `weight`: a scalar or one element for each dimension of x; an
    nn.Parameter, which is trained, or an nn.Buffer, so that all are part of the model's state.
    """

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self._names = branch_names(layer)
        for name in self._names:
            setattr(self, name, copy.deepcopy(weight))
        self._passed = 0

    def restart(self, *_: object) -> None:
        """Begin with the first branch again."""
        self._passed = 0

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Weigh `residual` for the next branch, and add the branch's output `x`."""
        weight: Tensor = getattr(self, self._names[self._passed])
        self._passed = (self._passed + 1) % len(self._names)
        return x + weight * residual


def weigh_shortcuts(layer: nn.Module, weight: Tensor) -> None:
    """Weigh the shortcuts of a layer of fairseq's Transformer, for all of its branches."""
    shortcuts = Shortcuts(layer, weight)
    layer.add_module("shortcuts", shortcuts)
    # In the layer's own attributes, where it takes precedence over the method of its class.
    vars(layer)["residual_connection"] = shortcuts
    # A forward pass that an error broke off leaves the count where it was.
    layer.register_forward_pre_hook(shortcuts.restart)
