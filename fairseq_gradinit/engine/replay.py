"""Forward passes that are repeated while a model changes from front to back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Self

import torch
from torch import nn


class _Call:
    """A call of a module: its output once that is settled, until then the calls that it makes."""

    def __init__(self) -> None:
        self.settled = False
        self.output: Any = None
        self.inner: list[_Call] = []
        self.made = 0

    def next(self) -> _Call:
        """The next of the calls that this one makes."""
        if self.made == len(self.inner):
            self.inner.append(_Call())
        self.made += 1
        return self.inner[self.made - 1]


class Replay:
    """Keeps the outputs of modules and hands them out when a forward pass comes by again.

    A context, inside of which the calls of `modules` are watched. A call is settled when it has
    ended before the first call of a module that is still open: nothing that may change has had an
    influence on it. Later passes take its output as it is.

    This is right only where a module has no effect but its output, and nobody writes into that:
    check the outcome.

    Args:
        modules: all those of the model.
        open: those of them that will change, until `close` is called for each.
    """

    def __init__(self, modules: Iterable[nn.Module], open: Iterable[nn.Module]) -> None:
        self._modules = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        self._open = set(open)
        self._replaced: list[Any] = []
        self._at = _Call()
        self._settles = True

    def of(self, run: Callable[[], object]) -> Callable[[], object]:
        """Does what `run` does, without the calls that were settled when it last did."""
        start = _Call()

        def again() -> object:
            self._at, self._settles = start, True
            start.made = 0
            return run()

        return again

    def close(self, module: nn.Module) -> None:
        """`module` does not change any more."""
        self._open.discard(module)

    def __enter__(self) -> Self:
        for module in self._modules:
            own = vars(module)
            self._replaced.append(own.get("forward"))
            own["forward"] = partial(self._call, module, module.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for module, before in zip(self._modules, self._replaced, strict=True):
            del vars(module)["forward"]
            if before is not None:
                vars(module)["forward"] = before

    def _call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        caller = self._at
        call = caller.next()
        if call.settled:
            return call.output
        if module in self._open:
            self._settles = False
        self._at, call.made = call, 0
        try:
            output = forward(*args, **kw)
        finally:
            self._at = caller
        if self._settles:
            call.settled, call.output = True, output
            call.inner.clear()
        return output
