"""Training data for schemes that look at some."""

from __future__ import annotations

from typing import Any

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.batches import PairedBatches


def training_batches(trainer: Any) -> PairedBatches:
    """Batches as GradInit draws them, of the size of the run's own; one for each process.

    Raises:
        GradInitError: the training data do not give enough of them.
    """
    data = trainer.cfg.dataset
    try:
        return PairedBatches(trainer, data.max_tokens, data.batch_size, micro_batches=1)
    except GradInitError as error:
        raise GradInitError(
            f"--init-scheme {trainer.cfg.task.init_scheme} draws sentences by index from training "
            f"data of at least {max(2, trainer.data_parallel_world_size)} batches with three "
            "sentences or more, and these are not: change --max-tokens or --batch-size, or the "
            "data"
        ) from error
