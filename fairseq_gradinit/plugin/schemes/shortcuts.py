"""Residual connections whose input is weighted: w x + f(x) in place of x + f(x)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Shortcuts(nn.Module):
    """The weights of one layer's shortcuts, in the place of fairseq's `residual_connection`.

    Args:
        weights: by the branch's name, in the order of the forward pass: a scalar or one element for
            each dimension of x. Each is an nn.Parameter, which is trained, or an nn.Buffer, so that
            all are part of the model's state.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            setattr(self, name, weight)
        self._names = tuple(weights)
        self._passed = 0

    def restart(self, *_: object) -> None:
        """Begin with the first branch again."""
        self._passed = 0

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Weigh `residual` for the next branch, and add the branch's output `x`."""
        weight: Tensor = getattr(self, self._names[self._passed])
        self._passed = (self._passed + 1) % len(self._names)
        return x + weight * residual


def weigh_shortcuts(layer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Weigh the shortcuts of a layer of fairseq's Transformer, for all of its branches."""
    shortcuts = Shortcuts(weights)
    layer.add_module("shortcuts", shortcuts)
    # In the layer's own attributes, where it takes precedence over the method of its class.
    vars(layer)["residual_connection"] = shortcuts
    # A forward pass that an error broke off leaves the count where it was.
    layer.register_forward_pre_hook(shortcuts.restart)
