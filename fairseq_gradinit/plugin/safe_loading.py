"""Let torch's safe loader read fairseq's checkpoints.

Since torch 2.6 `torch.load` builds only objects of classes it was told to trust. Listed here is
what fairseq's releases from 0.10 on put beside their tensors; nothing else is trusted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data.dictionary import Dictionary

from fairseq_gradinit.errors import GradInitError, said_by

# What numpy has pickles call to make an array or a scalar, and how NumPy 1 and 2 name its module.
_REBUILDERS = {
    "_reconstruct": np.zeros(1).__reduce__()[0],
    "scalar": np.float64(0).__reduce__()[0],
}
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")

TRUSTED: list[Any] = [
    # Options: all of them in 0.10, those of legacy models and tasks later.
    argparse.Namespace,
    # Counts that --eval-bleu adds up are arrays; accuracies and scores, and with them the best
    # validation result, can be scalars.
    *((call, f"{module}.{name}") for name, call in _REBUILDERS.items() for module in _MULTIARRAY),
    *(np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bhilqBHILQefd")),
    # The state of tasks on audio: their labels.
    Dictionary,
]


class BrokenCheckpoint(GradInitError):
    """A file that can be read does not hold a checkpoint, or not the whole of one."""


def allow_fairseq_checkpoints() -> None:
    """Add what is in fairseq's checkpoints to what torch may load."""
    torch.serialization.add_safe_globals(TRUSTED)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, its tensors on the CPU.

    Raises:
        BrokenCheckpoint: there is something else in the file, or it was cut off.
        GradInitError: the file cannot be read, or holds an object of a class that is not trusted.
    """
    allow_fairseq_checkpoints()
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise GradInitError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # What is no checkpoint ends in errors of many kinds.
        kind = GradInitError if "Unsupported global" in str(error) else BrokenCheckpoint
        raise kind(f"cannot read the checkpoint {path}: {said_by(error)}") from error
    return checkpoint
