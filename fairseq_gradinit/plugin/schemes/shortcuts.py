"""Residual connections whose input is weighted: w x + f(x) in place of x + f(x)."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from fairseq_gradinit.plugin.branches import branch_names


class Shortcuts(nn.Module):
    """The weights of one layer's shortcuts, in the place of fairseq's `residual_connection`.

    Each branch has a copy of `weight`: a scalar or one element for each dimension of x; an
    nn.Parameter, which is trained, or an nn.Buffer, so that all are part of the model's state.
    """

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self._names = branch_names(layer)
        for name in self._names:
            setattr(self, name, copy.deepcopy(weight))
        self._passed = 0

    def restart(self, *_: object) -> None:
        """Begin with the first branch again."""
        self._passed = 0

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Weigh `residual` for the next branch, and add the branch's output `x`."""
        weight: Tensor = getattr(self, self._names[self._passed])
        self._passed = (self._passed + 1) % len(self._names)
        return x + weight * residual


def weigh_shortcuts(layer: nn.Module, weight: Tensor) -> None:
    """Weigh the shortcuts of a layer of fairseq's Transformer, for all of its branches."""
    shortcuts = Shortcuts(layer, weight)
    layer.add_module("shortcuts", shortcuts)
    # In the layer's own attributes, where it takes precedence over the method of its class.
    vars(layer)["residual_connection"] = shortcuts
    # A forward pass that an error broke off leaves the count where it was.
    layer.register_forward_pre_hook(shortcuts.restart)
