"""Residual branches that start at zero.

A baseline in the manner of Fixup (Zhang et al., ICLR 2019, section 3, rule 1) and ReZero
(Bachlechner et al., UAI 2021, equation 2), without the parameters that they add.
"""

from __future__ import annotations

import torch
from torch import nn

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.branches import stacks


@torch.no_grad()
def zero_branches(model: nn.Module) -> None:
    """Set weight and bias of `out_proj` and `fc2` to zero, so that each f in x + f(x) is zero."""
    branches = [branch for stack in stacks(model) for branch in stack.branches]
    if not branches:
        raise GradInitError(
            f"--init-scheme needs layers of fairseq's Transformer, and {type(model).__name__} has "
            "none: choose another --arch, or leave --init-scheme out"
        )
    for branch in branches:
        for parameter in branch.values[1].parameters():
            parameter.zero_()
