"""Let torch's safe loader read fairseq's checkpoints.

Since torch 2.6 `torch.load` builds only objects of classes it was told to trust. A checkpoint of
fairseq holds one harmless class beside its tensors, for the options of legacy models and tasks;
nothing else is added.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fairseq_gradinit.errors import GradInitError


class BrokenCheckpoint(GradInitError):
    """A file that can be read does not hold a checkpoint, or not the whole of one."""


def allow_fairseq_checkpoints() -> None:
    """Add the classes in fairseq's checkpoints to those that torch may load."""
    torch.serialization.add_safe_globals([argparse.Namespace])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, its tensors on the CPU.

    Raises:
        BrokenCheckpoint: there is something else in the file, or it was cut off.
        GradInitError: the file cannot be read.
    """
    allow_fairseq_checkpoints()
    try:
        with path.open("rb") as file:
            document = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise GradInitError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # What is no checkpoint ends in errors of many kinds.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BrokenCheckpoint(f"cannot read the checkpoint {path}: {reason}") from error
    if not isinstance(document, dict):
        raise BrokenCheckpoint(f"{path} is no checkpoint: it holds no dictionary")
    return document
