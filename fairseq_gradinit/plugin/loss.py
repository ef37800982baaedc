"""The loss that training would differentiate, for any fairseq task.

Tasks may override `train_step` (several losses, several language pairs), so the loss is taken from
there and not from the criterion: an optimizer that only records what it is asked to differentiate
stands in for the run's own.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any
from unittest.mock import patch

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
        GradInitError: the criterion gives no sample size.
    """

    def __init__(self, trainer: Any) -> None:
        self._task, self._criterion = trainer.task, trainer.get_criterion()
        self._model = trainer.get_model()

    def __call__(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | float]:
        recorder = LossRecorder()
        _, sample_size, _ = self._task.train_step(
            sample=copy.deepcopy(batch.sample),
            model=self._model,
            criterion=self._criterion,
            optimizer=recorder,
            update_num=0,
            ignore_grad=False,
        )
        if isinstance(sample_size, Real):
            sample_size = float(sample_size)
        elif not isinstance(sample_size, torch.Tensor):
            raise GradInitError(
                f"criterion {type(self._criterion).__name__} returned {sample_size!r} as its "
                "sample size; GradInit needs the number of items that its loss sums over"
            )
        return torch.stack([loss.sum() for loss in recorder.losses]).sum(), sample_size


def forward_autocast(
    model: torch.nn.Module, config: GradInitConfig
) -> AbstractContextManager[object]:
    """Run the model's forward pass in the precision of `config` within fairseq's train_step.

    On GPUs train_step switches autocast off around the criterion, unless the optimizer is that of
    --amp, so the engine's own does not reach the model.
    """
    if config.precision == "fp32":
        return nullcontext()
    forward = model.forward
    device = next(model.parameters()).device.type

    def in_bf16(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False):
            return forward(*args, **kwargs)

    return patch.object(model, "forward", in_bf16)
