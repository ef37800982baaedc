"""Keep a model deterministic, and leave no trace, while GradInit looks at it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# What torch keeps in every module, of which forward passes move the buffers alone.
NOT_STATE = vars(nn.Module()).keys() - {"training", "_buffers"}


@contextmanager
def deterministic(*modules: nn.Module) -> Iterator[None]:
    """Switch every stochastic regulariser of `modules` off, then put everything back.

    Modules are in evaluation mode inside, so that dropout, layer drop and quantisation noise are
    off. Batch normalisation uses the statistics of the batch, as training will; recurrent layers
    stay in training mode with dropout 0, because cuDNN has no backward pass for them otherwise.
    Calls of `train()` and `eval()` on one of `modules` itself have no effect inside.

    On exit the modules are as they were on entry, except for parameters, submodules and hooks:
    modes, buffers (running statistics) and plain attributes (counters, caches), with the contents
    of lists, dictionaries, sets, arrays and tensors among these. Objects of other classes are not
    looked into. The state of every random number generator is as it was, too.
    """
    everything = list(dict.fromkeys(module for root in modules for module in root.modules()))
    devices = {p.device for root in modules for p in root.parameters() if p.is_cuda}
    state = _State(modules, everything)
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
            state.restore()


class _State:
    """The attributes of modules, and what is in them, as they are when this is made."""

    def __init__(self, roots: Iterable[nn.Module], modules: Iterable[nn.Module]) -> None:
        self._attributes = [(m, _attributes(m)) for m in modules]
        self._contents: dict[int, tuple[Any, Any]] = {}
        # A change of these, or of a view of them, is meant to last.
        self._kept = {_storage(p) for root in roots for p in root.parameters()}
        for root in roots:
            for buffer in root.buffers():
                self._look_into(buffer)
        for _, attributes in self._attributes:
            for value in attributes.values():
                self._look_into(value)

    def _look_into(self, value: Any) -> None:
        """Copy the contents of `value` if it can change, and those of what it contains."""
        if id(value) in self._contents:
            return
        if isinstance(value, Tensor):
            if _storage(value) not in self._kept:
                self._contents[id(value)] = value, value.detach().clone()
        elif isinstance(value, np.ndarray):
            self._contents[id(value)] = value, value.copy()
        elif isinstance(value, tuple):
            for item in value:
                self._look_into(item)
        elif isinstance(value, dict):
            self._contents[id(value)] = value, dict(value)
            for item in value.values():
                self._look_into(item)
        elif isinstance(value, list | set | deque):
            self._contents[id(value)] = value, list(value)
            for item in value:
                self._look_into(item)

    def restore(self) -> None:
        for module, before in self._attributes:
            own = vars(module)
            for name in _attributes(module).keys() - before.keys():
                del own[name]
            for name, value in before.items():
                if own.get(name, own) is not value:
                    own[name] = value
        with torch.no_grad():
            for value, contents in self._contents.values():
                if isinstance(value, Tensor):
                    value.detach().copy_(contents)
                elif isinstance(value, np.ndarray):
                    value[...] = contents
                else:
                    value.clear()
                    (value.extend if isinstance(value, list | deque) else value.update)(contents)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in NOT_STATE}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


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
