"""DeepNorm: LayerNorm(alpha x + f(x)), with branches that start small.

Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", arXiv 2203.00555, figure 2; the
constants are also those of the authors' torchscale. Dividing `out_proj` and `fc2` by alpha instead
would start as the same function, but Adam's steps would be alpha times as long for these weights.
"""

from __future__ import annotations

import torch
from torch import nn

from fairseq_gradinit.plugin.branches import stacks, weigh_shortcuts


def constants(encoder_layers: int, decoder_layers: int) -> dict[str, tuple[float, float]]:
    """Figure 2 of the paper: alpha and beta of each side that has layers.

    alpha is the weight of the shortcuts, beta the gain of Xavier's initialisation of v_proj,
    out_proj, fc1 and fc2.
    """
    n, m = encoder_layers, decoder_layers
    if n and m:
        both = (n**4 * m) ** (1 / 16)
        return {
            "encoder": (0.81 * both, 0.87 / both),
            "decoder": ((3 * m) ** (1 / 4), (12 * m) ** (-1 / 4)),
        }
    side, depth = ("encoder", n) if n else ("decoder", m)
    return {side: ((2 * depth) ** (1 / 4), (8 * depth) ** (-1 / 4))}


@torch.no_grad()
def deepnorm(model: nn.Module) -> None:
    """Weigh the shortcuts of a post-LN model, and draw its linear layers.

    Xavier's normal distribution has gain 1 for queries and keys. The biases of layers whose gain is
    beta are zero: fairseq's would be larger than what the weights put out in a deep model.
    """
    found = {stack.side: stack for stack in stacks(model)}
    depth = {side: len(stack.layers) for side, stack in found.items()}
    values = constants(depth.get("encoder", 0), depth.get("decoder", 0))
    for side, stack in found.items():
        alpha, beta = values[side]
        for layer in stack.layers:
            weigh_shortcuts(layer, nn.Buffer(torch.tensor(alpha)))
        for branch in stack.branches:
            for linear in branch.queries_and_keys:
                nn.init.xavier_normal_(linear.weight)
            for linear in branch.values:
                nn.init.xavier_normal_(linear.weight, gain=beta)
                if linear.bias is not None:
                    linear.bias.zero_()
