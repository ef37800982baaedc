"""Let torch's safe loader read fairseq's checkpoints.

Since torch 2.6 `torch.load` builds only objects of classes it was told to trust. A checkpoint of
fairseq holds one harmless class beside its tensors, for the options of legacy models and tasks;
nothing else is added.
"""

from __future__ import annotations

import argparse

import torch


def allow_fairseq_checkpoints() -> None:
    """Add the classes in fairseq's checkpoints to those that torch may load."""
    torch.serialization.add_safe_globals([argparse.Namespace])
