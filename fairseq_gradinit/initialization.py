"""GradInit for any PyTorch model in one call: `from fairseq_gradinit import initialize`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fairseq_gradinit.engine import (
    TARGET_NAMES,
    Block,
    GradInitConfig,
    Iteration,
    LossFunction,
    NormGains,
    Split,
    TargetName,
    collect_blocks,
    deterministic,
    fingerprint,
    learn_scales,
    pair_batches,
    thirds,
)
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales import Description, Scales

Loss = Tensor | tuple[Tensor, Tensor | float]
"""A mean loss of shape (); or a sum of losses of shape () and the count to divide it by."""


@dataclass(frozen=True)
class Initialization:
    """What `initialize` did; `learned` has the scales as they are written to a file."""

    learned: Scales

    @property
    def scales(self) -> dict[str, float]:
        """The factor on the initial value of each trainable parameter tensor, by its name."""
        return {block.name: block.scale for block in self.learned.blocks}

    @property
    def history(self) -> tuple[Iteration, ...]:
        """The record of the iterations."""
        return self.learned.history

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scales file that `fairseq-gradinit report` and `diff` read."""
        self.learned.save(Path(path))


def initialize(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Loss],
    loader: Iterable[Any],
    optimizer: str | torch.optim.Optimizer = "adam",
    lr: float | None = None,
    *,
    iterations: int = 100,
    scale_lr: float = 0.03,
    gamma: float = math.inf,
    min_scale: float = 0.01,
    max_scale: float = 100.0,
    norm_gains: NormGains = "learned",
    seed: int = 0,
    split: Split = thirds,
    progress: bool = True,
) -> Initialization:
    """Scale each parameter tensor of a fresh model so that the first training step is most useful.

    Algorithm 1 of Zhu et al., "GradInit: Learning to Initialize Neural Networks for Stable and
    Efficient Training" (NeurIPS 2021, arXiv:2102.08098). Call it once, before the first update and
    before the model is wrapped for several GPUs or a scheduler changes the learning rate.

    The weights of `model` change in place, and its gradients are None afterwards. Its modes and
    buffers, and the global random number generators, are as they were. A generator of the loader's
    own moves on.

    Args:
        model: freshly initialised, its trainable parameters in float32 or float64 on one device.
        loss_fn: the training loss of a batch, see `Loss`. Dropout is off while it is called, and
            batch normalisation uses the batch.
        loader: gives batches, and is iterated again when it ends. A batch is a tensor, or tuples,
            lists and dictionaries of tensors, with the examples along the first dimension. Each is
            shuffled, and cut in thirds A, B, C for the batches A + B and B + C of the method
            (section 3.3). It is moved to the model's device. Gradients of a few examples are noise:
            have the loader drop a last batch that is much smaller than the others.
        optimizer: what will train the model, one of torch's in `FIRST_STEPS`; or `adam` for steps
            along the sign of the gradient, `sgd` along the gradient, or `sgd-normalized` along the
            gradient over its l2 norm.
        lr: learning rate of the first step. If not given it is the optimizer's, 1e-3 for a name.
        iterations: number of updates of the scales; each costs about two training steps. The
            default settings are those of the nets in docs/digits.md.
        scale_lr: learning rate of Adam on the scales, which start at 1.
        gamma: bound on the norm of the gradient over all parameters (l1 for `adam`, otherwise l2);
            `math.inf` for none.
        min_scale, max_scale: bounds of the scales.
        norm_gains: whether parameters of normalisation layers keep scale 1 (`fixed`), or are
            `learned` too.
        seed: makes the result repeatable.
        split: makes the two batches of the method from one of the loader, for batches of other
            kinds. Half of the examples of each should be in the other, too.
        progress: show a progress bar on a terminal.

    Raises:
        GradInitError: an argument cannot be used, or losses or gradients are not finite. The model
            then has its initial weights.
    """
    blocks = collect_blocks({"": model}, norm_gains)
    device = _device(blocks)
    if isinstance(optimizer, torch.optim.Optimizer):
        target, length = _first_step(optimizer, model)
    else:
        # Another name is refused with the rest of the configuration.
        target, length = cast(TargetName, optimizer), 1e-3
    config = GradInitConfig(
        eta=length if lr is None else lr,
        target=target,
        gamma=gamma,
        iterations=iterations,
        lr=scale_lr,
        min_scale=min_scale,
        min_bias_scale=min_scale,
        max_scale=max_scale,
        norm_gains=norm_gains,
        seed=seed,
    )
    description = Description(config, fingerprint(blocks), str(device))
    pairs = pair_batches(loader, split, device)
    # None: on a terminal only.
    bar = tqdm(total=iterations, desc="GradInit", disable=None if progress else True)

    def advance(iteration: Iteration) -> None:
        loss = iteration.loss if iteration.trial_loss is None else iteration.trial_loss
        bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        bar.update()

    # The engine uses the gradients of the parameters as work space.
    model.zero_grad()
    with deterministic(model), bar:
        learned = learn_scales(blocks, _summed(loss_fn, model), pairs, config, on_iteration=advance)
    settings = description.settings(learned.second_order)
    return Initialization(Scales.of(blocks, learned.scale_of, settings, learned.history))


def _device(blocks: Sequence[Block]) -> torch.device:
    places = {(block.parameter.dtype, block.parameter.device) for block in blocks}
    if len(places) > 1 or next(iter(places))[0] not in (torch.float32, torch.float64):
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in places))
        raise GradInitError(
            "the trainable parameters must all be float32, or all float64, and on one device; they "
            f"are {found}: convert the model, and convert it back afterwards"
        )
    return blocks[0].parameter.device


FIRST_STEPS: dict[type[torch.optim.Optimizer], TargetName] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adam",
    torch.optim.Adamax: "adam",
    torch.optim.Adagrad: "adam",
}
"""The optimizers whose first step is one learning rate times the gradient, or its sign."""


def _first_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[TargetName, float]:
    """The direction and the length of the first step, without weight decay, as in the method."""
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in given:
            raise GradInitError(
                f"the optimizer does not train {name}: make it from model.parameters(), and freeze "
                "what is not trained by requires_grad_(False)"
            )
    found = [target for kind, target in FIRST_STEPS.items() if isinstance(optimizer, kind)]
    lengths = {
        float(group["lr"]) * (1.0 + group["momentum"] if group.get("nesterov") else 1.0)
        for group in optimizer.param_groups
    }
    if not found or len(lengths) > 1:
        raise GradInitError(
            f"the first step of {type(optimizer).__name__}, as it is set up, is not known to be "
            "one learning rate times the gradient or its sign for all parameters: name the closest "
            f"with optimizer={' or '.join(map(repr, TARGET_NAMES))}, and give lr"
        )
    return found[0], lengths.pop()


def _summed(loss_fn: Callable[[nn.Module, Any], Loss], model: nn.Module) -> LossFunction:
    def loss(batch: Any) -> tuple[Tensor, Tensor | float]:
        found = loss_fn(model, batch)
        total, count = found if isinstance(found, tuple) else (found, 1.0)
        if not (isinstance(total, Tensor) and total.dim() == 0 and total.requires_grad):
            raise GradInitError(
                "loss_fn must return the mean loss as a tensor of shape () with a gradient, or the "
                "sum of losses and their count"
            )
        return total, count

    return loss
