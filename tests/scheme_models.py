"""Small Transformers that the tests of the schemes look at."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import nn

import fairseq_gradinit.plugin.install  # noqa: F401


def build(arch: str, **given: Any) -> nn.Module:
    """A model of a few layers of width 32, on a joined dictionary of 96 symbols, in evaluation."""
    from fairseq.data import Dictionary
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, build_model

    dictionary = Dictionary()
    for i in range(92):
        dictionary.add_symbol(str(i))
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    sizes = {"layers": 2, "embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 2}
    sides = ("decoder",) if "_lm" in arch else ("encoder", "decoder")
    values = {f"{side}_{name}": size for side in sides for name, size in sizes.items()}
    args = Namespace(arch=arch, **{**values, **given})
    torch.manual_seed(1)
    if "_lm" not in arch:
        ARCH_CONFIG_REGISTRY[arch](args)
        return ARCH_MODEL_REGISTRY[arch].build_model(args, task).eval()
    args._name, args.max_target_positions = arch, 64
    args.decoder_input_dim = args.decoder_output_dim = args.decoder_embed_dim
    return build_model(args, task).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    """What an encoder-decoder puts out for a fixed batch, shape (4, 7, 96)."""
    rng = torch.Generator().manual_seed(2)
    source, target = (torch.randint(4, 96, (4, 7), generator=rng) for _ in range(2))
    with torch.no_grad():
        return model(source, torch.full((4,), 7), target)[0]
