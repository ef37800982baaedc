"""Keep a model deterministic, and leave no trace, while GradInit looks at it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def quiet(*modules: nn.Module) -> Iterator[None]:
    """Switch every stochastic regulariser of `modules` off, then put everything back.

    Modules are in evaluation mode inside, so that dropout, layer drop and quantisation noise are
    off. Batch normalisation uses the statistics of the batch, as training will; recurrent layers
    stay in training mode with dropout 0, because cuDNN has no backward pass for them otherwise.
    Calls of `train()` and `eval()` on one of `modules` itself have no effect inside. On exit the
    modes, all buffers (running statistics) and the state of every random number generator are as
    they were on entry.
    """
    everything = [module for root in modules for module in root.modules()]
    modes = [module.training for module in everything]
    recurrent = [(m, m.dropout) for m in everything if isinstance(m, nn.RNNBase)]
    buffers = [(b, b.detach().clone()) for root in modules for b in root.buffers()]
    devices = {p.device for root in modules for p in root.parameters() if p.is_cuda}
    with random_state_kept(devices):
        try:
            for module in everything:
                module.training = isinstance(module, _BatchNorm | nn.RNNBase)
            for layer, _ in recurrent:
                layer.dropout = 0.0
            for root in modules:
                vars(root)["train"] = lambda mode=True, root=root: root
            yield
        finally:
            for root in modules:
                vars(root).pop("train", None)
            for module, mode in zip(everything, modes, strict=True):
                module.training = mode
            for layer, dropout in recurrent:
                layer.dropout = dropout
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


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
