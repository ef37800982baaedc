"""Small Transformers that the tests of the schemes look at."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, build_model
from torch import nn

import fairseq_gradinit.plugin.install  # noqa: F401


def build_from(args: Namespace) -> nn.Module:
    """A model of these settings, on a joined dictionary of 96 symbols, in evaluation."""
    dictionary = Dictionary()
    for i in range(92):
        dictionary.add_symbol(str(i))
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    torch.manual_seed(1)
    if "_lm" not in args.arch:
        kind = ARCH_MODEL_REGISTRY[args.arch]
        ARCH_CONFIG_REGISTRY[args.arch](args)
        return kind.build_model(args, task).eval()
    args._name, args.max_target_positions = args.arch, 64
    args.decoder_input_dim = args.decoder_output_dim = args.decoder_embed_dim
    return build_model(args, task).eval()


def build(arch: str, **given: Any) -> nn.Module:
    """A model of a few layers of width 32."""
    sizes = {"layers": 2, "embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 2}
    sides = ("decoder",) if "_lm" in arch else ("encoder", "decoder")
    values = {f"{side}_{name}": size for side in sides for name, size in sizes.items()}
    return build_from(Namespace(arch=arch, **{**values, **given}))


def outputs(model: nn.Module) -> torch.Tensor:
    """What an encoder-decoder puts out for a fixed batch, shape (4, 7, 96)."""
    rng = torch.Generator().manual_seed(2)
    source, target = (torch.randint(4, 96, (4, 7), generator=rng) for _ in range(2))
    with torch.no_grad():
        return model(source, torch.full((4,), 7), target)[0]


WIDE = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"embed_dim": 128, "ffn_embed_dim": 512}.items()
} | {"decoder_layers": 3}


def wide_weights(arch: str, **given: Any) -> dict[str, torch.Tensor]:
    """The matrices in 2 and 3 layers of a model wide enough to see how they were drawn."""
    parameters = build(arch, **WIDE, **given).named_parameters()
    return {name: p for name, p in parameters if ".layers." in name and p.dim() == 2}
