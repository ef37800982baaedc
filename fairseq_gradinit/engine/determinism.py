"""Keep a model deterministic, and leave no trace, while GradInit looks at it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# What torch keeps in every module.
NOT_STATE = vars(nn.Module()).keys() - {"training"}


@contextmanager
def deterministic(*modules: nn.Module) -> Iterator[None]:
    """Switch every stochastic regulariser of `modules` off, then put everything back.

    Modules are in evaluation mode inside. Batch normalisation uses the statistics of the batch, as
    training will; recurrent layers stay in training mode with dropout 0, because cuDNN has no
    backward pass for them otherwise. Calls of `train()` and `eval()` on one of `modules` itself
    have no effect inside.

    On exit modes, buffers (running statistics), plain attributes (counters, caches) and the state
    of every random number generator are as they were.
    """
    everything = list(dict.fromkeys(module for root in modules for module in root.modules()))
    devices = {p.device for root in modules for p in root.parameters() if p.is_cuda}
    attributes = [(module, _attributes(module), dict(module._buffers)) for module in everything]
    values = [(b, b.detach().clone()) for root in modules for b in root.buffers()]
    with random_state_kept(devices):
        try:
            for module in everything:
                module.training = isinstance(module, _BatchNorm | nn.RNNBase)
                if isinstance(module, nn.RNNBase):
                    module.dropout = 0.0
            for root in modules:
                vars(root)["train"] = lambda mode=True, root=root: root
            yield
        finally:
            for module, before, buffers in attributes:
                for name in _attributes(module).keys() - before.keys():
                    del vars(module)[name]
                vars(module).update(before)
                module._buffers.update(buffers)
            for buffer, value in values:
                buffer.detach().copy_(value)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in NOT_STATE}


@contextmanager
def random_state_kept(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Gives every random number generator, those of `devices` included, its state back on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def seed_everything(seed: int) -> None:
    """Seed the random number generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
