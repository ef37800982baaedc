"""Pairs of batches, and how they are cut in overlapping thirds from those of any loader."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fairseq_gradinit.errors import GradInitError


@dataclass(frozen=True)
class BatchPair:
    """The data of one iteration: the batches S and S~, each as this process's micro-batches.

    S and S~ should share half of their examples: independent batches make the scales chase
    noise, identical ones overfit the step (section 3.3). A process may have no micro-batches.

    Attributes:
        first: S, whose gradient makes the trial step.
        second: S~, on which the loss after it is taken.
    """

    first: Sequence[Any]
    second: Sequence[Any]


Split = Callable[[Any], tuple[Any, Any] | None]
"""Makes the batches S and S~ of the method from one batch; None for a batch that is too small."""


Order = TypeVar("Order", Tensor, np.ndarray)


def overlapping_thirds(order: Order) -> tuple[Order, Order]:
    """A + B and B + C of shuffled examples cut in thirds A, B, C (section 3.3).

    One or two examples are left out if their number is not a multiple of three.
    """
    third = len(order) // 3
    return order[: 2 * third], order[third : 3 * third]


def pair_batches(loader: Iterable[Any], split: Split, device: torch.device) -> Iterator[BatchPair]:
    """One pair after another, without end.

    A batch that is too small is left out, except the first: an epoch's last one may be.

    Args:
        loader: is iterated again when it ends.
        device: where tensors in tuples, lists and dictionaries are moved to.

    Raises:
        GradInitError: there are no more batches, or the first is too small.
    """
    usable = False
    for batch in _without_end(loader):
        if pair := split(batch):
            usable = True
            first, second = (_map(lambda tensor: tensor.to(device), part) for part in pair)
            yield BatchPair([first], [second])
        elif not usable:
            raise GradInitError(
                "a batch has fewer than three examples, and GradInit cuts each in thirds: use a "
                "larger batch size"
            )


def thirds(batch: Any) -> tuple[Any, Any] | None:
    """A batch shuffled and cut by `overlapping_thirds`; None if it has fewer than three examples.

    Args:
        batch: a tensor, or tuples, lists and dictionaries of tensors, shape (examples, ...).

    Raises:
        GradInitError: it is something else.
    """
    sizes = {len(tensor) for tensor in _tensors(batch)}
    if len(sizes) != 1:
        raise _uncut(
            "tensors with the examples along the first dimension, which has sizes "
            f"{', '.join(map(str, sorted(sizes)))} here"
            if sizes
            else "a tensor"
        )
    examples = sizes.pop()
    if examples < 3:
        return None
    first, second = overlapping_thirds(torch.randperm(examples))
    return _map(lambda tensor: tensor[first], batch), _map(lambda tensor: tensor[second], batch)


def _without_end(loader: Iterable[Any]) -> Iterator[Any]:
    count = 0
    while True:
        before = count
        for batch in loader:
            count += 1
            yield batch
        if count == 0:
            raise GradInitError("the loader gives no batch: GradInit needs some of the data")
        if count == before:
            raise GradInitError(
                f"the loader ended after {count} batches and cannot be iterated again: use a list "
                "or a DataLoader instead of a generator, or fewer iterations"
            )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor) and batch.dim() > 0:
        yield batch
    elif isinstance(batch, MutableMapping | tuple | list):
        for value in batch.values() if isinstance(batch, MutableMapping) else batch:
            yield from _tensors(value)
    elif batch is not None:
        scalar = "scalar " if isinstance(batch, Tensor) else ""
        raise _uncut(
            f"tensors of examples, and this one has a value of type {scalar}{type(batch).__name__}"
        )


def _uncut(needs: str) -> GradInitError:
    return GradInitError(
        f"a batch must consist of {needs}: give split, a function that makes two batches of one"
    )


def _map(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """`batch` with `function` applied to every tensor in its tuples, lists and dictionaries."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, MutableMapping):
        # A copy, so that it stays of its own class.
        mapped = copy.copy(batch)
        for key, value in batch.items():
            mapped[key] = _map(function, value)
        return mapped
    if isinstance(batch, tuple | list):
        items = [_map(function, value) for value in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch
