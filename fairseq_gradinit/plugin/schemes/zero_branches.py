"""Residual branches that start at zero.

A baseline in the manner of Fixup (Zhang et al., ICLR 2019, section 3, rule 1: the last layer of
each residual branch starts at zero) and ReZero (Bachlechner et al., UAI 2021, equation 2), without
the parameters that they add. Everything else is as fairseq draws it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fairseq_gradinit.plugin.branches import stacks


def initialise(trainer: Any) -> None:
    """Set the last linear layer of each residual branch of the trainer's model to zero.

    Raises:
        GradInitError: see `fairseq_gradinit.plugin.branches.stacks`.
    """
    zero_branches(trainer.get_model())


@torch.no_grad()
def zero_branches(model: nn.Module) -> None:
    """Set weight and bias of `out_proj` and `fc2` to zero, so that each f in x + f(x) is zero."""
    for stack in stacks(model):
        for branch in stack.branches:
            for parameter in branch.last.parameters():
                parameter.zero_()
