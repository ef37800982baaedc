"""DeepNorm: LayerNorm(alpha x + f(x)), with branches that start small.

Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", arXiv 2203.00555: figure 2 has the
constants and which matrices are drawn with gain beta. The constants are also those of the authors'
torchscale (architecture/encoder.py and decoder.py).

As a function, LayerNorm(alpha x + f(x)) is LayerNorm(x + f(x) / alpha) but for the LayerNorm's
epsilon, so a plain post-LN model with smaller `out_proj` and `fc2` starts as the same function. It
does not train as the same model: Adam moves a weight by the learning rate whatever its size, so
dividing these weights by alpha makes each step of theirs alpha times as long. So alpha is kept, in
an architecture of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fairseq_gradinit.plugin.branches import branch_names, stacks
from fairseq_gradinit.plugin.schemes.shortcuts import attach
from fairseq_gradinit.plugin.schemes.variants import register_variants, require_post_ln, switch


@dataclass(frozen=True)
class Constants:
    """Of one stack of layers.

    Attributes:
        alpha: weight of the shortcuts.
        beta: gain of Xavier's initialisation of v_proj, out_proj, fc1 and fc2.
    """

    alpha: float
    beta: float


def constants(encoder_layers: int, decoder_layers: int) -> dict[str, Constants]:
    """The constants of each side that has layers (figure 2 of the paper)."""
    n, m = encoder_layers, decoder_layers
    if n and m:
        both = (n**4 * m) ** (1 / 16)
        return {
            "encoder": Constants(0.81 * both, 0.87 / both),
            "decoder": Constants((3 * m) ** (1 / 4), (12 * m) ** (-1 / 4)),
        }
    side, depth = ("encoder", n) if n else ("decoder", m)
    return {side: Constants((2 * depth) ** (1 / 4), (8 * depth) ** (-1 / 4))}


def configure(model: Any) -> None:
    """Have a model's configuration build the DeepNorm variant.

    Raises:
        GradInitError: the model is not a post-LN Transformer of fairseq.
    """
    require_post_ln(model, "deepnorm")
    switch(model, "deepnorm")


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
        for layer in stack.layers:
            attach(layer, {name: torch.tensor(values[side].alpha) for name in branch_names(layer)})
        for branch in stack.branches:
            for linear in branch.queries_and_keys:
                nn.init.xavier_normal_(linear.weight)
            for linear in branch.values:
                nn.init.xavier_normal_(linear.weight, gain=values[side].beta)
                if linear.bias is not None:
                    linear.bias.zero_()


register_variants("deepnorm", deepnorm)
