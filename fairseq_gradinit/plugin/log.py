"""What a user reads of a run: the progress bar, TensorBoard, and the table of scales."""

from __future__ import annotations

import math
from typing import Any

from fairseq.logging import progress_bar

from fairseq_gradinit.engine import GradInitConfig, Iteration
from fairseq_gradinit.scales import Scales, kinds_of_blocks

LINES_OF_LOG = 20
TAG = "gradinit"


class IterationLog:
    """Writes about LINES_OF_LOG of the iterations where fairseq would write those of training.

    Logging options are those of fairseq's `cfg`; to TensorBoard it writes only if `tracked`.
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
            tensorboard_logdir=common.tensorboard_logdir if tracked else None,
            default_log_format="simple" if common.no_progress_bar else "tqdm",
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
            trial_loss, gamma = iteration.trial_loss, self._config.gamma
            # A progress bar has room for the first two.
            stats = {
                **({} if trial_loss is None else {"trial_loss": round(trial_loss, 4)}),
                "loss": round(iteration.loss, 4),
                "min_scale": round(iteration.min_scale, 3),
                "max_scale": round(iteration.max_scale, 3),
                "gnorm": round(iteration.grad_norm, 2),
                "gamma": gamma if math.isfinite(gamma) else "off",
                "kind": iteration.kind,
            }
            self._bar.log(stats, tag=TAG, step=iteration.index)
        if last:
            # What the progress bar does after its last item.
            next(self._steps, None)


def scale_table(scales: Scales) -> list[str]:
    """The scales by kind of block, as lines of text; one column for each layer."""
    groups = kinds_of_blocks(scales)
    width = max(len(kind) for kind in groups)
    lines = [f"{'scales by kind of block':{width}}  first layer to last"]
    for kind, blocks in groups.items():
        if any(block.state == "learned" for block in blocks):
            cells = [f"{b.scale:.2f}" if b.state == "learned" else "-" for b in blocks]
        else:
            cells = [f"{blocks[0].scale:g} ({', '.join(sorted({b.state for b in blocks}))})"]
        lines.append(f"{kind:{width}}  {' '.join(cells)}")
    return lines
