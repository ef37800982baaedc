"""What the self-check keeps of its probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Arm:
    """A way to start training; with `warmup` the learning rate rises linearly over the probe."""

    start: Literal["default", "gradinit"]
    warmup: bool

    @property
    def title(self) -> str:
        start = "GradInit" if self.start == "gradinit" else "default"
        return f"{start}, warmup" if self.warmup else start


@dataclass(frozen=True)
class Update:
    """One update of a probe.

    Attributes:
        loss: of its batch before it, as the criterion reports it.
        gradient_norm: l2, before clipping.
        step_sizes: for each parameter tensor, in the order of `Probe.tensors`, the l2 norm of what
            the update changed over that of the tensor after it; 0 for one that is all zero.
    """

    lr: float
    loss: float
    gradient_norm: float
    step_sizes: tuple[float, ...]


@dataclass(frozen=True)
class Look:
    """What the model made of some fixed training sentences after `update` updates.

    Attributes:
        loss: with dropout off, in bits per unit of sample size (for cross entropy a target token).
        shares: for each layer, in the order of `Probe.layers`, the token-dependent share of the
            power of its output, sum |x_t - mean x|^2 / sum |x_t|^2 over all tokens t.
        source_bits: what the loss grows by when the sentences trade sources; None for a model
            without an encoder and a decoder.
    """

    update: int
    loss: float
    shares: tuple[float, ...]
    source_bits: float | None


@dataclass(frozen=True)
class Probe:
    """The first updates of one start at one learning rate.

    Attributes:
        tensors, layers: their names, such as "encoder.layers.0".
        diverged: why it ended early, if the loss or the gradient was not finite.
    """

    arm: Arm
    lr: float
    tensors: tuple[str, ...]
    layers: tuple[str, ...]
    updates: tuple[Update, ...]
    looks: tuple[Look, ...]
    diverged: str | None
    seconds: float

    def last_layer_shares(self) -> dict[str, tuple[float, ...]]:
        """The share of each side's last layer in every look, by the side, such as "encoder"."""
        last = {name.rpartition(".layers.")[0]: i for i, name in enumerate(self.layers)}
        return {side: tuple(look.shares[i] for look in self.looks) for side, i in last.items()}
