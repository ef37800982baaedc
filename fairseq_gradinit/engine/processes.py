"""One GradInit over several data-parallel processes.

Every process holds the whole model and its share of each batch. What depends on the data is summed
over the processes before it is used, so that all of them see the gradient of the global batch and
keep identical scales.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed
from torch import Tensor

from fairseq_gradinit.errors import GradInitError, said_by

T = TypeVar("T")


class OneProcess:
    """No other process: see `ProcessGroup`."""

    count = 1
    rank = 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        pass

    def max_(self, tensor: Tensor) -> None:
        pass

    def gather(self, text: str) -> list[str]:
        return [text]


class ProcessGroup:
    """A group of torch.distributed, None being the default one.

    All processes must make the same calls in the same order. The methods raise GradInitError when
    another process has ended, or does not answer in time.
    """

    def __init__(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        self._group = group
        self.count = torch.distributed.get_world_size(group)
        self.rank = torch.distributed.get_rank(group)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type and device by their sums, bit for bit the same on each."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._call(torch.distributed.all_reduce, flat, torch.distributed.ReduceOp.SUM, self._group)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def max_(self, tensor: Tensor) -> None:
        """Replace each element of `tensor` by its maximum over the processes."""
        operation = torch.distributed.ReduceOp.MAX
        self._call(torch.distributed.all_reduce, tensor, operation, self._group)

    def gather(self, text: str) -> list[str]:
        """The texts that the processes give here, in the order of their ranks."""
        texts = [""] * self.count
        self._call(torch.distributed.all_gather_object, texts, text, self._group)
        return texts

    def _call(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args)
        except RuntimeError as error:
            raise GradInitError(
                f"process {self.rank} of {self.count} lost the others in {collective.__name__}: "
                "one of them has ended, or did not answer in time. Look for the first error among "
                "their logs; given again, the same command goes on from the last state saved "
                f"({said_by(error)})"
            ) from error


Processes = OneProcess | ProcessGroup
"""The processes that share the work."""


def require_same_setup(
    processes: Processes, prepare: Callable[[], T], describe: Callable[[T], Mapping[str, object]]
) -> T:
    """What `prepare` returns, when it has succeeded in all processes and they describe it alike.

    Once they have begun, a process that fails leaves the others waiting for it, and processes that
    were started differently give to one collective what belongs to another.

    Args:
        prepare: must not wait for another process.
        describe: what must be the same everywhere, by names that a user can understand.

    Raises:
        GradInitError: `prepare` has raised it in one of them, or they differ; the same in all.
    """
    if processes.count == 1:
        return prepare()
    found: list[T] = []
    texts: dict[str, str] = {}
    error = ""
    try:
        found.append(prepare())
        texts = {name: str(value) for name, value in describe(found[0]).items()}
    except GradInitError as raised:
        error = str(raised)
    told = [json.loads(text) for text in processes.gather(json.dumps([error, texts]))]
    for rank, (error, _) in enumerate(told):
        if error:
            everywhere = all(other == error for other, _ in told)
            raise GradInitError(error if everywhere else f"process {rank} of {len(told)}: {error}")
    first = told[0][1]
    for rank, (_, other) in enumerate(told):
        differing = [name for name in {**first, **other} if other.get(name) != first.get(name)]
        if differing:
            differences = (f"{name} {other.get(name)}, not {first.get(name)}" for name in differing)
            raise GradInitError(
                f"process {rank} of {len(told)} was started otherwise than process 0: it has "
                f"{'; '.join(differences)}: start all of them with the same command and seed, on "
                "the same data, with the same versions"
            )
    return found[0]
