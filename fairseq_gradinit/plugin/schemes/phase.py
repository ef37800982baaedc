"""Where a scheme acts on a run: on the configuration, and between building and the first update."""

from __future__ import annotations

import logging
import time
from typing import Any

from fairseq_gradinit.plugin.schemes.options import Scheme
from fairseq_gradinit.plugin.trainer import (
    drop_copies,
    full_precision,
    weights_come_from_checkpoint,
)

logger = logging.getLogger("fairseq_gradinit")


def run_scheme(trainer: Any, scheme: Scheme) -> None:
    """Initialise the model of `trainer`, unless the run resumes from a checkpoint.

    Args:
        trainer: fairseq's trainer; its training data are loaded, no update is done.

    Raises:
        GradInitError: the scheme cannot be applied to this model or these data.
    """
    if scheme.initialise is None:
        return
    name = trainer.cfg.task.init_scheme
    if weights_come_from_checkpoint(trainer):
        logger.info("skipping --init-scheme %s: the weights come from a checkpoint", name)
        return
    start = time.monotonic()
    drop_copies(trainer)
    with full_precision(trainer):
        scheme.initialise(trainer)
    logger.info("--init-scheme %s applied (%.1f s)", name, time.monotonic() - start)
