"""The residual branches of an encoder, which may start small instead of being learned.

At high learning rates the first few updates of Adam make the outputs of a post-LN encoder equal for
all tokens, and the decoder then learns to do without its source. Branches that start small delay
that until the decoder has begun to use the encoder; see docs/experiments.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

from fairseq_gradinit.errors import GradInitError

# fairseq's names, in a model of one or of several language pairs.
_BRANCH = re.compile(r"(^|\.)encoder\.layers\.\d+\.(self_attn\.(v_proj|out_proj)|fc1|fc2)\.weight$")


def fixed_scales(modules: Mapping[str, nn.Module], factor: float) -> Callable[[str], float | None]:
    """The scale of a tensor by its name: `factor` for the encoder's branches, None for others.

    Args:
        modules: see `fairseq_gradinit.blocks.collect_blocks`.
        factor: 1 fixes nothing.

    Raises:
        GradInitError: `factor` is not 1, and there are no such branches.
    """
    if factor == 1.0:
        return lambda name: None
    names = [name for module in modules.values() for name, _ in module.named_parameters()]
    if not any(_BRANCH.search(name) for name in names):
        raise GradInitError(
            "--gradinit-encoder-branches was given, but the model has no encoder layers (tensors "
            "named like encoder.layers.0.fc1.weight): leave it out"
        )
    return lambda name: factor if _BRANCH.search(name) else None
