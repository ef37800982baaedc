"""One GradInit over several data-parallel processes.

Every process holds the whole model and its share of each batch. What depends on the data is summed
over the processes before it is used, so that all of them see the gradient of the global batch and
keep identical scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch.distributed
from torch import Tensor

from fairseq_gradinit.errors import GradInitError, said_by

# As in torch's DistributedDataParallel: large enough to use the network, small beside a model.
BUCKET_BYTES = 25 * 2**20


class Processes(Protocol):
    """The processes that share the work; all of them must make the same calls in the same order.

    Attributes:
        count: how many there are.
        rank: which of them this is, from 0.

    The methods raise GradInitError when another process has ended, or does not answer in time.
    """

    count: int
    rank: int

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, bit for bit the same on each."""

    def max_(self, tensor: Tensor) -> None:
        """Replace each element of `tensor` by its maximum over the processes."""

    def gather(self, text: str) -> list[str]:
        """The texts that the processes give here, in the order of their ranks."""


class OneProcess:
    """No other process: see `Processes`."""

    count = 1
    rank = 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        pass

    def max_(self, tensor: Tensor) -> None:
        pass

    def gather(self, text: str) -> list[str]:
        return [text]


class ProcessGroup:
    """A group of torch.distributed, None being the default one: see `Processes`."""

    def __init__(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        self._group = group
        self.count = torch.distributed.get_world_size(group)
        self.rank = torch.distributed.get_rank(group)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            if len(bucket) == 1:
                self._all_reduce(bucket[0], torch.distributed.ReduceOp.SUM)
                continue
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            self._all_reduce(flat, torch.distributed.ReduceOp.SUM)
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            torch._foreach_copy_(
                bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)]
            )

    def max_(self, tensor: Tensor) -> None:
        self._all_reduce(tensor, torch.distributed.ReduceOp.MAX)

    def gather(self, text: str) -> list[str]:
        texts = [""] * self.count
        self._call(torch.distributed.all_gather_object, texts, text, self._group)
        return texts

    def _all_reduce(self, tensor: Tensor, operation: Any) -> None:
        self._call(torch.distributed.all_reduce, tensor, operation, self._group)

    def _call(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, **kwargs)
        except RuntimeError as error:
            raise GradInitError(
                f"process {self.rank} of {self.count} lost the others in {collective.__name__}: "
                "one of them has ended, or did not answer in time. Look for the first error among "
                "their logs; given again, the same command goes on from the last state saved "
                f"({said_by(error)})"
            ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut `tensors` in runs of one type and at most BUCKET_BYTES, or of a single tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if bucket and (size + bytes_ > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += bytes_
    if bucket:
        yield bucket
