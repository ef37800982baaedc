"""T-Fixup: no LayerNorm; branches and embeddings start small, by depth.

Huang et al., "Improving Transformer Optimization Through Better Initialization", ICML 2020, section
3.2, with the conventions of the authors' code (layer6ai-labs/T-Fixup, modules/transformer_layer.py
and models/transformer.py): Xavier's uniform distribution, for queries and keys with fairseq's gain
1/sqrt(2), biases zero, embeddings scaled by the depth of the encoder if both sides share them.
"""

from __future__ import annotations

import torch
from torch import nn

from fairseq_gradinit.plugin.branches import stacks


@torch.no_grad()
def t_fixup(model: nn.Module) -> None:
    """Take the LayerNorms out of an encoder-decoder model, and scale its weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # By name: apex has a LayerNorm of its own.
            if "layernorm" in type(child).__name__.lower():
                setattr(parent, name, nn.Identity())
    scaled = set()
    for stack in stacks(model):
        depth = len(stack.layers)
        small = (9 * depth) ** (-1 / 4)
        factor = 0.67 * depth ** (-1 / 4) if stack.side == "encoder" else small
        for branch in stack.branches:
            for linear in (*branch.queries_and_keys, *branch.values):
                if linear.bias is not None:
                    linear.bias.zero_()
            for linear in branch.values:
                nn.init.xavier_uniform_(linear.weight)
                linear.weight.mul_(factor)
        embeddings = model.get_parameter(f"{stack.side}.embed_tokens.weight")
        if embeddings not in scaled:
            embeddings.mul_(small)
            scaled.add(embeddings)
