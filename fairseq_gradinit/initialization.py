"""GradInit for any PyTorch model in one call: `from fairseq_gradinit import initialize`.

A layer above the engine, in plain PyTorch.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

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
    """What `initialize` did.

    Attributes:
        learned: the scales as they are written to a file.
    """

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
        """Write the scales file that `fairseq-gradinit report`, `diff` and `apply` read.

        Raises:
            GradInitError: the file cannot be written.
        """
        self.learned.save(Path(path))


def initialize(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Loss],
    loader: Iterable[Any],
    optimizer: str | torch.optim.Optimizer = "adam",
    lr: float | None = None,
    *,
    eta: float | None = None,
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

    The weights of `model` change in place. Its modes, buffers and gradients, and the global random
    number generators, are afterwards as they were. A generator of the loader's own moves on.

    Args:
        model: freshly initialised, its trainable parameters in float32 or float64 on one device.
        loss_fn: the training loss of a batch, see `Loss`. Dropout is off while it is called, and
            batch normalisation uses the batch.
        loader: gives batches, and is iterated again when it ends. A batch is a tensor, or tuples,
            lists and dictionaries of tensors, with the examples along the first dimension. Each is
            shuffled, and cut in thirds A, B, C for the batches A + B and B + C of the method
            (section 3.3). It is moved to the model's device. Gradients of a few examples are noise:
            have the loader drop a last batch that is much smaller than the others.
        optimizer: what will train the model: a torch optimizer, whose first step is tried out; or
            `adam` for steps along the sign of the gradient, `sgd` along the gradient, or
            `sgd-normalized` along the gradient over its l2 norm.
        lr: learning rate of training, 1e-3 if not given. A torch optimizer has its own.
        eta: length of the trial step in units of the learning rate, in place of the optimizer's.
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
        progress: show a progress bar on a terminal, if tqdm is installed.

    Raises:
        GradInitError: an argument cannot be used, or losses or gradients are not finite. The model
            then has its initial weights.
    """
    blocks = collect_blocks({"": model}, norm_gains)
    device = _device(blocks)
    if not isinstance(optimizer, torch.optim.Optimizer):
        # Another one is refused with the rest of the configuration.
        target, length = cast(TargetName, optimizer), 1e-3 if lr is None else lr
    elif lr is None:
        _require_parameters(model, optimizer)
        target, length = _first_step(optimizer, device)
    else:
        raise GradInitError("the learning rate is the optimizer's: leave out lr")
    config = GradInitConfig(
        eta=length if eta is None else eta,
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
    with (
        _gradients_kept(blocks),
        deterministic(model),
        _progress_bar(iterations, progress) as advance,
    ):
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


def _require_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    given = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    own = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if given != own.keys():
        missing = [name for p, name in own.items() if p not in given]
        which = f"{missing[0]} is missing" if missing else "some are of another module"
        raise GradInitError(
            f"the parameters of the optimizer are not those of the model ({which}): make it from "
            "model.parameters(), and freeze what is not trained by requires_grad_(False)"
        )


_GRADIENT = ((1.0, -0.03), (0.2, -0.001))
_TOLERANCE = 0.02
"""Relative. It leaves room for an epsilon of Adam's up to 1e-5 beside the smallest gradient."""


def _first_step(optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[TargetName, float]:
    """The direction and the length of the first step, from optimizers like it of one small tensor.

    Weight decay is left out, as it is in the method.

    Raises:
        GradInitError: it is no step of the method's.
    """
    gradient = torch.tensor(_GRADIENT, dtype=torch.float64, device=device)
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {name: v for name, v in optimizer.defaults.items() if name in accepted}
    steps = []
    try:
        for group in optimizer.param_groups:
            # Two sizes, since there are optimizers whose step depends on that of the weights.
            for size in (0.5, 2.0):
                weight = nn.Parameter(torch.full_like(gradient, size))
                weight.grad = gradient.clone()
                like = [{**group, "params": [weight], "weight_decay": 0.0}]
                type(optimizer)(like, **defaults).step()
                steps.append(size - weight.detach())
    except Exception as error:  # Anybody's code.
        raise GradInitError(_unknown_step(optimizer)) from error
    targets: tuple[tuple[TargetName, Tensor], ...] = (("adam", gradient.sign()), ("sgd", gradient))
    for target, direction in targets:
        lengths = torch.stack(steps) / direction
        length = lengths[0, 0, 0]
        if length > 0 and torch.allclose(lengths, length, rtol=_TOLERANCE, atol=0.0):
            # Without what rounding and an epsilon of Adam's change.
            return target, float(f"{length:.5g}")
    raise GradInitError(_unknown_step(optimizer))


def _unknown_step(optimizer: torch.optim.Optimizer) -> str:
    return (
        f"the first step of {type(optimizer).__name__}, as it is set up, is not one learning rate "
        "times the gradient or its sign for all parameters: name the closest with "
        f"optimizer={' or '.join(map(repr, TARGET_NAMES))}, and give lr"
    )


def _summed(loss_fn: Callable[[nn.Module, Any], Loss], model: nn.Module) -> LossFunction:
    def loss(batch: Any) -> tuple[Tensor, Tensor | float]:
        found = loss_fn(model, batch)
        total, count = found if isinstance(found, tuple) and len(found) == 2 else (found, 1.0)
        counts = count.dim() == 0 if isinstance(count, Tensor) else isinstance(count, Real)
        if not (isinstance(total, Tensor) and total.dim() == 0 and counts):
            shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise GradInitError(
                "loss_fn must return the mean loss as a tensor of shape (), or the sum of losses "
                f"and their count; it returned a {type(found).__name__}{shape}"
            )
        if not total.requires_grad:
            raise GradInitError(
                "the loss has no gradient: loss_fn must compute it from what the model returns, "
                "without detach() or torch.no_grad()"
            )
        return total, count

    return loss


@contextmanager
def _gradients_kept(blocks: Sequence[Block]) -> Iterator[None]:
    """The engine uses the gradients of the parameters as work space."""
    kept = [block.parameter.grad for block in blocks]
    for block in blocks:
        block.parameter.grad = None
    try:
        yield
    finally:
        for block, gradient in zip(blocks, kept, strict=True):
            block.parameter.grad = gradient


@contextmanager
def _progress_bar(iterations: int, show: bool) -> Iterator[Callable[[Iteration], None]]:
    """Gives what is to be called after each iteration; without tqdm it does nothing."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        tqdm = None
    if tqdm is None:
        yield lambda iteration: None
        return
    # None: on a terminal only.
    with tqdm(total=iterations, desc="GradInit", disable=None if show else True) as bar:

        def advance(iteration: Iteration) -> None:
            loss = iteration.loss if iteration.trial_loss is None else iteration.trial_loss
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()

        yield advance
