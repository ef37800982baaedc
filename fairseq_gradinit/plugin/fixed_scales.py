"""Tensors of fairseq's models whose scale is given instead of being learned.

The residual branches of an encoder may start small. At high learning rates the first few updates of
Adam make the outputs of a post-LN encoder equal for all tokens, and the decoder then learns to do
without its source. Branches that start small delay that until the decoder has begun to use the
encoder; see docs/experiments.md.

The bias of the keys keeps scale 1. It adds the same to all logits of a query, which softmax takes
out again, so its gradient is rounding, and the scale would walk at random.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

from torch import nn

from fairseq_gradinit.errors import GradInitError

# fairseq's names, in a model of one or of several language pairs.
_BRANCH = re.compile(r"(^|\.)encoder\.layers\.\d+\.(self_attn\.(v_proj|out_proj)|fc1|fc2)\.weight$")
_KEY_BIAS = re.compile(r"(^|\.)k_proj\.bias$")


def fixed_scales(
    modules: Mapping[str, nn.Module],
    encoder_branches: float,
    required: bool,
    kept: Collection[str] = (),
) -> Callable[[str], float | None]:
    """The scale of a tensor by its name, None for those that are learned; 1 for those in `kept`.

    Args:
        modules: those of `collect_blocks`.
        encoder_branches: scale of the encoder's residual branches; 1 has them learned.
    """
    small = encoder_branches != 1.0
    names = (name for module in modules.values() for name, _ in module.named_parameters())
    if small and required and not any(map(_BRANCH.search, names)):
        raise GradInitError(
            "--gradinit-encoder-branches was given, but the model has no encoder layers (tensors "
            "named like encoder.layers.0.fc1.weight): leave it out"
        )

    def scale_of(name: str) -> float | None:
        if name in kept or _KEY_BIAS.search(name):
            return 1.0
        return encoder_branches if small and _BRANCH.search(name) else None

    return scale_of
