"""The residual branches of fairseq's Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import nn

from fairseq_gradinit.errors import GradInitError

LAYERS: dict[Literal["encoder", "decoder"], type[nn.Module]] = {
    "encoder": TransformerEncoderLayerBase,
    "decoder": TransformerDecoderLayerBase,
}


@dataclass(frozen=True)
class Branch:
    """One sublayer f of x + f(x).

    Attributes:
        layer: fairseq's layer that it belongs to.
        name: "self_attn", "encoder_attn" or "ffn".
        readers: the linear layers that read x. In attention to an encoder, only the queries do.
        queries_and_keys: those of attention; none of a feed-forward network.
        values: the linear layers that the output is linear in, up to ReLU: v_proj and out_proj, or
            fc1 and fc2. The output's scale is the product of theirs.
        norm: the LayerNorm of this sublayer: after the addition in a post-LN model.
    """

    layer: nn.Module
    name: str
    readers: tuple[nn.Linear, ...]
    queries_and_keys: tuple[nn.Linear, ...]
    values: tuple[nn.Linear, nn.Linear]
    norm: nn.Module

    @property
    def last(self) -> nn.Linear:
        """The layer whose output is f(x)."""
        return self.values[1]


@dataclass(frozen=True)
class Stack:
    """The layers of an encoder or of a decoder.

    Attributes:
        side: which of the two.
        branches: in the order of the forward pass.
    """

    side: Literal["encoder", "decoder"]
    branches: list[Branch]

    @property
    def layers(self) -> list[nn.Module]:
        """fairseq's layers, in the order of the forward pass."""
        return list(dict.fromkeys(branch.layer for branch in self.branches))


def stacks(model: nn.Module) -> list[Stack]:
    """Every encoder and every decoder of a model.

    Raises:
        GradInitError: the model has no layers of fairseq's Transformer.
    """
    found: dict[str, Stack] = {}
    for name, module in model.named_modules():
        for side, kind in LAYERS.items():
            if isinstance(module, kind):
                stack = found.setdefault(name.rpartition(".")[0], Stack(side, []))
                stack.branches.extend(_branches(module))
    if not found:
        raise GradInitError(
            f"--init-scheme needs layers of fairseq's Transformer, and {type(model).__name__} has "
            "none: choose another --arch, or leave --init-scheme out"
        )
    return list(found.values())


def branch_names(layer: nn.Module) -> list[str]:
    """The names of a layer's branches, in the order of the forward pass."""
    return [branch.name for branch in _branches(layer)]


def _branches(layer: nn.Module) -> Iterator[Branch]:
    for name in ("self_attn", "encoder_attn"):
        attention = getattr(layer, name, None)
        if attention is None:
            continue
        keys_too = (attention.k_proj, attention.v_proj) if name == "self_attn" else ()
        yield Branch(
            layer,
            name,
            readers=(attention.q_proj, *keys_too),
            queries_and_keys=(attention.q_proj, attention.k_proj),
            values=(attention.v_proj, attention.out_proj),
            norm=getattr(layer, f"{name}_layer_norm"),
        )
    fc1, fc2 = layer.get_submodule("fc1"), layer.get_submodule("fc2")
    assert isinstance(fc1, nn.Linear)
    assert isinstance(fc2, nn.Linear)
    yield Branch(layer, "ffn", (fc1,), (), (fc1, fc2), layer.get_submodule("final_layer_norm"))
