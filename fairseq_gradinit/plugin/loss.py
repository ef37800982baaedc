"""The loss that training would differentiate, for any fairseq task.

Tasks may override `train_step` (several losses, several language pairs), so the loss is taken from
there and not from the criterion: an optimizer that only records what it is asked to differentiate
stands in for the run's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch

from fairseq_gradinit.engine import GradInitConfig
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.batches import MicroBatch


class LossRecorder:
    """Stands in for the optimizer in `task.train_step`; keeps the losses to differentiate."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def backward(self, loss: torch.Tensor) -> None:
        self.losses.append(loss)

    def __getattr__(self, name: str) -> Any:
        raise GradInitError(
            f"this task's train_step uses the optimizer's {name}, so GradInit cannot take its "
            "loss: learn the scales with another task of the same model, and give them with "
            "--gradinit-scales"
        )


class TaskLoss:
    """Maps a micro-batch to (summed loss, sample size), as the trainer would see them.

    Losses are those of the criterion: for cross entropy in nats, summed over target tokens. Call
    it inside `deterministic`, which keeps the model in evaluation mode whatever the task does.
    Tasks, models and criteria may change the sample that they get: it is a copy.

    Raises (when called):
        GradInitError: the criterion gives no sample size greater than 0, or no loss.
    """

    def __init__(self, trainer: Any) -> None:
        self._task = trainer.task
        self._model = trainer.get_model()
        self._criterion = trainer.get_criterion()

    def __call__(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | float]:
        recorder = LossRecorder()
        _count_updates_once(self._model)
        _, sample_size, _ = self._task.train_step(
            sample=_copied(batch.sample, {}),
            model=self._model,
            criterion=self._criterion,
            optimizer=recorder,
            update_num=0,
            ignore_grad=False,
        )
        return self._total(recorder.losses), self._checked(sample_size)

    def _total(self, losses: list[torch.Tensor]) -> torch.Tensor:
        if not losses:
            raise GradInitError(
                f"the train_step of task {type(self._task).__name__} differentiated no loss"
            )
        return torch.stack([loss.sum() for loss in losses]).sum()

    def _checked(self, sample_size: Any) -> torch.Tensor | float:
        if isinstance(sample_size, torch.Tensor) and sample_size.numel() == 1:
            return sample_size.detach()
        if isinstance(sample_size, Real) and not isinstance(sample_size, bool):
            return float(sample_size)
        raise GradInitError(
            f"criterion {type(self._criterion).__name__} returned {sample_size!r} as its sample "
            "size; GradInit needs the number of items that its loss sums over"
        )


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, by a tenth of the time that `copy.deepcopy` takes for tensors."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, torch.Tensor):
        copied: Any = value.clone()
    elif type(value) is dict:
        copied = {name: _copied(item, memo) for name, item in value.items()}
    elif type(value) in (list, tuple):
        copied = type(value)(_copied(item, memo) for item in value)
    else:
        return copy.deepcopy(value, memo)
    memo[id(value)] = copied
    return copied


def _count_updates_once(model: torch.nn.Module) -> None:
    """Have `model` ignore a number of updates that it knows, until `deterministic` ends.

    train_step tells it each time; fairseq's models then walk through all their modules, which can
    take longer than a forward pass.
    """
    if "set_num_updates" in vars(model) or not hasattr(model, "set_num_updates"):
        return
    tell: Any = model.set_num_updates
    known: list[int] = []

    def set_num_updates(num_updates: int) -> None:
        if known != [num_updates]:
            tell(num_updates)
            known[:] = [num_updates]

    vars(model)["set_num_updates"] = set_num_updates


@contextmanager
def forward_autocast(model: torch.nn.Module, config: GradInitConfig) -> Iterator[None]:
    """Run the model's forward pass in the precision of `config` within fairseq's train_step.

    On GPUs train_step switches autocast off around the criterion, unless the optimizer is that of
    --amp, so the engine's own does not reach the model.
    """
    if config.precision == "fp32":
        yield
        return
    forward = model.forward
    device = next(model.parameters()).device.type

    def in_bf16(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            return forward(*args, **kwargs)

    vars(model)["forward"] = in_bf16
    try:
        yield
    finally:
        del vars(model)["forward"]
