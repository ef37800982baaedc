"""What a user reads of a run: the progress bar and trackers, and the table of scales."""

from __future__ import annotations

import math
import os
from typing import Any

from fairseq.logging import progress_bar

from fairseq_gradinit.engine import GradInitConfig, Iteration
from fairseq_gradinit.scales import BlockScale, Scales, kinds_of_blocks

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

    def _wandb_step(self, index: int) -> int:
        # W&B drops what comes with a step below the last one: counting lines, not iterations,
        # leaves the steps of training free.
        return -(-index // self._interval)

    def _show(self, iteration: Iteration) -> None:
        stats = iteration_stats(iteration, self._config.gamma)
        self._bar.log(stats, tag=TAG, step=iteration.index)
        if self._wandb is not None:
            stats["iteration"] = iteration.index
            self._wandb.log(stats, tag=TAG, step=self._wandb_step(iteration.index))


def iteration_stats(iteration: Iteration, gamma: float) -> dict[str, Any]:
    """One iteration as the values of one log line; a progress bar has room for the first two."""
    trial = {} if iteration.trial_loss is None else {"trial_loss": round(iteration.trial_loss, 4)}
    return {
        **trial,
        "loss": round(iteration.loss, 4),
        "min_scale": round(iteration.min_scale, 3),
        "max_scale": round(iteration.max_scale, 3),
        "gnorm": round(iteration.grad_norm, 2),
        "gamma": gamma if math.isfinite(gamma) else "off",
        "kind": iteration.kind,
    }


def scale_table(scales: Scales) -> list[str]:
    """The scales by kind of block, as lines of text; one column for each layer."""
    groups = kinds_of_blocks(scales)
    width = max(len(kind) for kind in groups)
    lines = [f"{'scales by kind of block':{width}}  first layer to last"]
    for kind, blocks in groups.items():
        cells = [_cell(block) for block in blocks]
        if all(block.state != "learned" for block in blocks):
            cells = [f"{blocks[0].scale:g} ({', '.join(sorted({b.state for b in blocks}))})"]
        lines.append(f"{kind:{width}}  {' '.join(cells)}")
    return lines


def _cell(block: BlockScale) -> str:
    return f"{block.scale:.2f}" if block.state == "learned" else "-"
