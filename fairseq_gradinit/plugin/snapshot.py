"""The norms and residual branches of a model as it is now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fairseq_gradinit.engine import Block, Processes
from fairseq_gradinit.plugin.branches import stacks_by_name, variances
from fairseq_gradinit.scales import Snapshot


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
