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
    The gradient of S (`first`) makes the trial step, the loss after it is taken on S~ (`second`).
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
    """One pair after another on `device`, iterating `loader` again when it ends.

    Batches that are too small are left out: an epoch's last one may be.

    Raises:
        GradInitError: there are no more batches.
    """
    while True:
        usable = False
        for batch in loader:
            if pair := split(batch):
                usable = True
                first, second = (_map(lambda tensor: tensor.to(device), part) for part in pair)
                yield BatchPair([first], [second])
        if not usable:
            raise GradInitError(
                "the loader gives no more batches of three examples or more: use a larger batch "
                "size, or instead of a generator, which ends, a list or a DataLoader"
            )


def thirds(batch: Any) -> tuple[Any, Any] | None:
    """A batch shuffled and cut by `overlapping_thirds`; None if it has fewer than three examples.

    It is a tensor, or tuples, lists and dictionaries of tensors, shape (examples, ...).

    Raises:
        GradInitError: it is something else.
    """
    values = list(_values(batch))
    sizes = {v.shape[:1] if isinstance(v, Tensor) else () for v in values}
    if len(sizes) != 1 or () in sizes:
        raise GradInitError(
            "a batch must consist of tensors with the examples along the first dimension, which "
            "has one size in all: give split, a function that makes two batches of one"
        )
    examples = len(values[0])
    if examples < 3:
        return None
    first, second = overlapping_thirds(torch.randperm(examples))
    return _map(lambda tensor: tensor[first], batch), _map(lambda tensor: tensor[second], batch)


def _values(batch: Any) -> Iterator[Any]:
    """All but None in the tuples, lists and dictionaries of `batch`."""
    if isinstance(batch, MutableMapping):
        yield from _values(list(batch.values()))
    elif isinstance(batch, tuple | list):
        for item in batch:
            yield from _values(item)
    elif batch is not None:
        yield batch


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
