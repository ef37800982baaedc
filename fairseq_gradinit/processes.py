"""One GradInit over several data-parallel processes.

Every process holds the whole model and its share of each batch. What depends on the data is summed
over the processes before it is used, so that all of them see the gradient of the global batch and
keep identical scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed
from torch import Tensor


class Processes(Protocol):
    """The processes that share the work; all of them must make the same calls in the same order."""

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the processes, bit for bit the same on each."""

    def max_(self, tensor: Tensor) -> None:
        """Replace each element of `tensor` by its maximum over the processes."""


class OneProcess:
    """No other process: see `Processes`."""

    def sum_(self, tensor: Tensor) -> None:
        pass

    def max_(self, tensor: Tensor) -> None:
        pass


@dataclass(frozen=True)
class ProcessGroup:
    """A group of torch.distributed, None being the default one: see `Processes`."""

    group: torch.distributed.ProcessGroup | None = None

    def sum_(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.SUM, self.group)

    def max_(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, self.group)
