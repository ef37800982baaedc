"""The weights m_i W_i of a model, and the scales m_i with their optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fairseq_gradinit.engine.blocks import Block, base_weights, set_weights
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.history import KINDS, IterationKind
from fairseq_gradinit.engine.processes import Processes
from fairseq_gradinit.engine.state import Moments
from fairseq_gradinit.errors import GradInitError


class ScaledWeights:
    """Keeps m_i W_i in the parameters of a model, and descends by the scales m_i.

    At first the parameters of `blocks` hold the initial weights W_i. The `scales` are those of the
    learned blocks, shape (learned,), float64.

    Raises:
        GradInitError: the processes hold different weights.
    """

    def __init__(self, blocks: list[Block], config: GradInitConfig, processes: Processes) -> None:
        self.blocks = blocks
        self.processes = processes
        self.parameters: list[Tensor] = [block.parameter for block in blocks]
        self._learned = [i for i, block in enumerate(blocks) if block.learned]
        self._base = base_weights(blocks)
        self._device = self.parameters[self._learned[0]].device
        biases = [blocks[i].is_bias for i in self._learned]
        lower = [config.min_bias_scale if is_bias else config.min_scale for is_bias in biases]
        self._lower = self._vector(lower)
        self._upper = torch.full_like(self._lower, config.max_scale)
        self.scales = torch.ones_like(self._lower, requires_grad=True)
        # One Adam for each kind of iteration: their gradients differ by orders of magnitude, and
        # shared moments would let one kind decide the step of the other.
        self._adam = {
            kind: torch.optim.Adam([self.scales], lr=config.lr, betas=config.betas, fused=True)
            for kind in KINDS
        }
        sums = torch.stack([self._base[i].double().sum() for i in self._learned])
        self.require_same("initial weights", self.compare(sums, stop=False).tolist()[0])
        self.put()

    def descend(self, kind: IterationKind, by_scales: Tensor, usable: Tensor) -> None:
        """A step of Adam down `by_scales`, within the bounds; none unless `usable`, shape ()."""
        adam = self._adam[kind]
        self.scales.grad = by_scales
        # The interface by which torch's GradScaler makes a fused optimizer leave out a step.
        vars(adam)["found_inf"] = (~usable).to(torch.float32)
        adam.step()
        self.scales.grad = None
        with torch.no_grad():
            self.scales.clamp_(self._lower, self._upper)
        self.put()

    def put(self) -> None:
        """Have the parameters hold m_i W_i."""
        set_weights(self.blocks, self._base, self.scales)

    def restore(self) -> None:
        """Have the parameters hold the initial weights W_i."""
        for parameter in self.parameters:
            parameter.grad = None
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self._base)

    def dots(self, tensors: Sequence[Tensor]) -> Tensor:
        """<t_i, W_i> of every learned block, t_i being the sum over processes; shape (learned,)."""
        dots = torch.stack(
            [torch.dot(tensors[i].flatten(), self._base[i].flatten()) for i in self._learned]
        ).double()
        self.processes.sum_([dots])
        return dots

    def name(self, index: int) -> str:
        """Of the learned block that `scales[index]` is for."""
        return self.blocks[self._learned[index]].name

    def scale_of(self) -> dict[str, float]:
        """The scale of every block by its name, of those that are not learned too."""
        scales = iter(self.scales.tolist())
        return {b.name: next(scales) if b.learned else b.fixed_scale for b in self.blocks}

    def moments(self) -> dict[IterationKind, Moments]:
        """What the optimizers remember; nothing of a kind that has not occurred."""
        found: dict[IterationKind, Moments] = {}
        for kind, adam in self._adam.items():
            if kept := adam.state[self.scales]:
                mean, square = kept["exp_avg"].tolist(), kept["exp_avg_sq"].tolist()
                found[kind] = Moments(int(kept["step"]), tuple(mean), tuple(square))
        return found

    def load(self, scales: Sequence[float], moments: Mapping[IterationKind, Moments]) -> None:
        """Go on with these `scales`, and with what `moments` has told."""
        with torch.no_grad():
            self.scales.copy_(self._vector(scales))
        for kind, kept in moments.items():
            self._adam[kind].state[self.scales] = {
                "step": torch.tensor(float(kept.step), device=self._device),
                "exp_avg": self._vector(kept.mean),
                "exp_avg_sq": self._vector(kept.square),
            }
        self.put()

    def compare(self, values: Tensor, stop: bool) -> Tensor:
        """The first index where the processes have different values, or -1; whether one says stop.

        `values` have shape (learned,), the answer has shape (2,).
        """
        extremes = torch.cat([values, -values, torch.full_like(values[:1], float(stop))])
        self.processes.max_(extremes)
        n = len(values)
        # NaN is equal to nothing, itself included.
        differ = ~(extremes[:n] == -extremes[n : 2 * n])
        index = torch.where(differ.any(), differ.to(torch.uint8).argmax(), -1)
        return torch.stack([index.double(), extremes[-1]])

    def require_same(self, what: str, index: float) -> None:
        """Raise an error if `index`, of `compare`, is not -1."""
        if index >= 0:
            raise GradInitError(
                f"the processes have different {what}, first for {self.name(int(index))}: start "
                "all of them with the same command and seed"
            )

    def _vector(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._device)
