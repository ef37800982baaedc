"""The residual branches of fairseq's Transformers, and how much each of them puts out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from fairseq_gradinit.engine import Block, Processes
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales import Snapshot

LAYERS: dict[Literal["encoder", "decoder"], type[nn.Module]] = {
    "encoder": TransformerEncoderLayerBase,
    "decoder": TransformerDecoderLayerBase,
}


@dataclass(frozen=True)
class Branch:
    """One sublayer f of x + f(x).

    Its parts are looked up when they are asked for, since a user's own sublayer may lack them.

    Attributes:
        layer: fairseq's layer that it belongs to.
        name: "self_attn", "encoder_attn" or "ffn".

    Raises (by each of the other attributes):
        GradInitError: the sublayer has no such part.
    """

    layer: nn.Module
    name: str

    @property
    def queries_and_keys(self) -> tuple[nn.Linear, ...]:
        """Those of attention; none of a feed-forward network."""
        return () if self.name == "ffn" else (self._projection("q"), self._projection("k"))

    @property
    def values(self) -> tuple[nn.Linear, nn.Linear]:
        """The linear layers that the output is linear in, up to ReLU.

        These are v_proj and out_proj, or fc1 and fc2: the output's scale is the product of theirs.
        """
        if self.name == "ffn":
            return self._linear("fc1"), self._linear("fc2")
        return self._projection("v"), self._projection("out")

    @property
    def last(self) -> nn.Linear:
        """The layer whose output is f(x)."""
        return self.values[1]

    def _projection(self, name: str) -> nn.Linear:
        return self._linear(f"{self.name}.{name}_proj")

    def _linear(self, place: str) -> nn.Linear:
        found = dict(self.layer.named_modules()).get(place)
        if not isinstance(found, nn.Linear):
            raise GradInitError(
                f"--init-scheme needs the sublayers of fairseq's own Transformer, and {place} of "
                f"{type(self.layer).__name__} is no linear layer: choose another --arch, or leave "
                "--init-scheme out"
            )
        return found


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
                stack.branches.extend(Branch(module, name) for name in branch_names(module))
    return found


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

    They are nan for a branch that no batch passes through, and for one of a layer that does not
    call its `residual_connection` once for each branch. Call this inside `deterministic`.

    Args:
        evaluate: runs the model on a batch.
        batches: the same ones in every process, which share them; without padding.
    """
    weights = (p for branch in branches for p in branch.layer.parameters())
    device = next(weights, torch.empty(0)).device
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
    connect: Callable[..., Tensor] = cast(Any, branch.layer).residual_connection
    names = branch_names(branch.layer)
    calls = 0

    def connection(*values: Any, **named: Any) -> Tensor:
        nonlocal calls
        if names[calls % len(names)] == branch.name:
            output, x = [*values, *named.values()][:2]
            sums.add_(torch.stack([_moments(x), _moments(output)]))
        calls += 1
        return connect(*values, **named)

    own["residual_connection"] = connection
    try:
        yield
    finally:
        del own["residual_connection"]
        if before is not None:
            own["residual_connection"] = before
        if calls % len(names):
            sums.fill_(math.nan)


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
    """Measure what `Effect` describes. Call this inside `deterministic`.

    Args:
        evaluate: runs the model on a batch.
        batches: the same ones in every process, which share them; without padding. If there are
            none, no branch is measured.
    """
    norms = torch.stack([block.parameter.detach().double().norm() for block in blocks]).tolist()
    shares = _shares(model, evaluate, batches, processes) if batches else {}
    return Snapshot(dict(zip([block.name for block in blocks], norms, strict=True)), shares)


def _shares(
    model: nn.Module,
    evaluate: Callable[[Any], object],
    batches: Sequence[Any],
    processes: Processes,
) -> dict[str, float]:
    """The share of every branch, see `Effect.shares`; nan for one that no batch passes through."""
    place_of = {module: name for name, module in model.named_modules()}
    branches = [branch for stack in stacks_by_name(model).values() for branch in stack.branches]
    if not branches:
        return {}
    measured = variances(branches, evaluate, batches, processes)
    return {
        f"{place_of[branch.layer]}.{branch.name}": output / (x + output) if x + output else 0.0
        for branch, (x, output) in zip(branches, measured, strict=True)
    }
