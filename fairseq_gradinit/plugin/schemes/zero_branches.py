"""Residual branches that start at zero.

A baseline in the manner of Fixup (Zhang et al., ICLR 2019, section 3, rule 1) and ReZero
(Bachlechner et al., UAI 2021, equation 2), without the parameters that they add.
"""

from __future__ import annotations

import torch
from torch import nn

from fairseq_gradinit.plugin.branches import stacks


@torch.no_grad()
def zero_branches(model: nn.Module) -> None:
    """Set weight and bias of `out_proj` and `fc2` to zero, so that each f in x + f(x) is zero."""
    for stack in stacks(model):
        for branch in stack.branches:
            for parameter in branch.last.parameters():
                parameter.zero_()
