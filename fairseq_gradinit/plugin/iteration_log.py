"""The iterations on fairseq's progress bar and in its experiment trackers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from fairseq.logging import progress_bar

from fairseq_gradinit.engine import GradInitConfig, Iteration
from fairseq_gradinit.plugin import log_text

LINES_OF_LOG = 20
TAG = "gradinit"


class IterationLog:
    """Writes about LINES_OF_LOG of the iterations where fairseq would write those of training.

    Args:
        cfg: fairseq's configuration, whose logging options it follows.
        config: the settings of the run.
        tracked: whether this process writes to experiment trackers too.
    """

    def __init__(self, cfg: Any, config: GradInitConfig, tracked: bool) -> None:
        self._config = config
        self._interval = max(1, config.iterations // LINES_OF_LOG)
        common = cfg.common
        self._bar = progress_bar.progress_bar(
            range(config.iterations),
            log_format=common.log_format,
            log_interval=self._interval,
            prefix=TAG,
            aim_repo=common.aim_repo if tracked else None,
            aim_run_hash=common.aim_run_hash if tracked else None,
            aim_param_checkpoint_dir=cfg.checkpoint.save_dir,
            tensorboard_logdir=common.tensorboard_logdir if tracked else None,
            default_log_format="simple" if common.no_progress_bar else "tqdm",
            azureml_logging=common.azureml_logging and tracked,
        )
        self._wandb: Any = None
        if common.wandb_project and tracked:
            self._wandb = progress_bar.progress_bar(
                [],
                log_format="none",
                wandb_project=common.wandb_project,
                wandb_run_name=os.environ.get(
                    "WANDB_NAME", os.path.basename(cfg.checkpoint.save_dir)
                ),
            )
        self._steps = iter(self._bar)
        self._shown = 0

    def write(self, iteration: Iteration) -> None:
        """Take note of an iteration; the first may come after others that an earlier run did."""
        while self._shown < iteration.index:
            next(self._steps)
            self._shown += 1
        last = iteration.index == self._config.iterations
        if iteration.index % self._interval == 0 or last:
            self._show(iteration)
        if last:
            # What the progress bar does after its last item.
            next(self._steps, None)

    def write_scales(self, scales: Sequence[float]) -> None:
        """Write a histogram of the learned scales to the experiment trackers."""
        values = np.asarray(scales)
        wrapper = self._bar
        while hasattr(wrapper, "wrapped_bar"):
            self._write_histogram(wrapper, values)
            wrapper = wrapper.wrapped_bar
        if self._wandb is not None and progress_bar.wandb is not None:
            histogram = progress_bar.wandb.Histogram(values)
            step = self._wandb_step(self._config.iterations)
            progress_bar.wandb.log({f"{TAG}/scales": histogram}, step=step)

    def _write_histogram(self, wrapper: Any, values: np.ndarray) -> None:
        step = self._config.iterations
        if isinstance(wrapper, progress_bar.TensorboardProgressBarWrapper):
            writer = wrapper._writer(TAG)
            if writer is not None:
                writer.add_histogram("scales", values, step)
                writer.flush()
        elif isinstance(wrapper, progress_bar.AimProgressBarWrapper) and wrapper.run is not None:
            from aim import Distribution

            context = {"tag": TAG}
            wrapper.run.track(Distribution(values), name="scales", step=step, context=context)

    def _wandb_step(self, index: int) -> int:
        # W&B drops what comes with a step below the last one: counting lines, not iterations,
        # leaves the steps of training free.
        return -(-index // self._interval)

    def _show(self, iteration: Iteration) -> None:
        stats = log_text.iteration_stats(iteration, self._config.gamma)
        self._bar.log(stats, tag=TAG, step=iteration.index)
        if self._wandb is not None:
            stats["iteration"] = iteration.index
            self._wandb.log(stats, tag=TAG, step=self._wandb_step(iteration.index))
