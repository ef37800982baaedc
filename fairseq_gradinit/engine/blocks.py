"""Which parameter tensors GradInit scales.

A block is one trainable parameter tensor. A tensor that several modules share (tied embeddings)
is one block, whatever the module types are. Blocks without a scale of their own still take part
in the trial step: training will move them too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fairseq_gradinit.engine.config import NormGains
from fairseq_gradinit.errors import GradInitError

BlockState = Literal["learned", "zero", "norm gain", "centered", "fixed"]


@dataclass(frozen=True)
class Block:
    """One trainable parameter tensor.

    Attributes:
        name: dotted name in the model, of its first occurrence when it is shared.
        state: `learned` when it gets a scale; `zero` when all its elements are zero; `norm gain`
            when it belongs to a normalisation layer and those are left at scale 1; `centered` when
            it is a bias that centers a LayerNorm; `fixed` when its scale was given.
        fixed_scale: the scale of a block that is not learned.
    """

    name: str
    parameter: nn.Parameter
    state: BlockState
    fixed_scale: float = 1.0

    @property
    def learned(self) -> bool:
        return self.state == "learned"

    @property
    def is_bias(self) -> bool:
        return "bias" in self.name.rpartition(".")[2]


def collect_blocks(
    modules: Mapping[str, nn.Module],
    norm_gains: NormGains,
    fixed: Callable[[str], float | None] = lambda name: None,
) -> list[Block]:
    """List the blocks of `modules`, in the order of `named_parameters`.

    Args:
        modules: by the prefix of their names, for example `{"": model, "criterion": criterion}`.
        fixed: the scale of the tensor of this name if it is given and not learned, else None.

    Raises:
        GradInitError: no block is left to learn a scale for, or a tensor is not finite.
    """
    blocks: dict[nn.Parameter, Block] = {}
    for name, owner, parameter in _named_parameters(modules):
        if parameter in blocks or not parameter.requires_grad:
            continue
        if not torch.isfinite(parameter).all():
            raise GradInitError(
                f"parameter {name} holds NaN or infinity before GradInit begins: "
                "check how the model initialises it"
            )
        if not parameter.any():
            blocks[parameter] = Block(name, parameter, "zero")
        elif norm_gains == "fixed" and _is_normalisation(owner):
            blocks[parameter] = Block(name, parameter, "norm gain")
        elif (scale := fixed(name)) is not None:
            blocks[parameter] = Block(name, parameter, "fixed", scale)
        else:
            blocks[parameter] = Block(name, parameter, "learned")
    if not any(block.learned for block in blocks.values()):
        raise GradInitError(
            "the model has no parameter tensor that GradInit could scale: every one is frozen, "
            "all zero, or a gain of a normalisation layer"
        )
    return list(blocks.values())


def frozen_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the parameters that training, and so GradInit, leaves as they are."""
    return [name for name, _, p in _named_parameters(modules) if not p.requires_grad]


def _named_parameters(
    modules: Mapping[str, nn.Module],
) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for prefix, root in modules.items():
        for module_name, module in root.named_modules():
            path = ".".join(part for part in (prefix, module_name) if part)
            for leaf, parameter in module.named_parameters(recurse=False):
                yield (f"{path}.{leaf}" if path else leaf), module, parameter


def _is_normalisation(module: nn.Module) -> bool:
    # By class name, not type: fairseq, apex and others bring normalisation layers of their own,
    # all of them called after one of torch's (FusedLayerNorm, Fp32GroupNorm, T5LayerNorm).
    return "norm" in type(module).__name__.lower()


def base_weights(blocks: Sequence[Block]) -> list[Tensor]:
    """Copies of the initial tensors W_i, one for each block."""
    return [block.parameter.detach().clone() for block in blocks]


@torch.no_grad()
def set_weights(blocks: list[Block], base: list[Tensor], scales: Tensor) -> None:
    """Set every learned block to m_i W_i and every other to its fixed scale times W_i, in place.

    `scales` are those of the learned blocks, in their order. The same ones give the same weights
    to the last bit, however often they are set.
    """
    torch._foreach_copy_([block.parameter for block in blocks], base)
    learned: list[Tensor] = [block.parameter for block in blocks if block.learned]
    factors: list[Tensor] = [s.to(p.dtype) for p, s in zip(learned, scales.unbind(), strict=True)]
    torch._foreach_mul_(learned, factors)
    for block in blocks:
        if block.state == "fixed":
            block.parameter.mul_(block.fixed_scale)


@contextmanager
def at_fixed_scales(blocks: Sequence[Block]) -> Iterator[None]:
    """Inside, the blocks whose scale was given have it."""
    fixed = [block for block in blocks if block.state == "fixed"]
    base = base_weights(fixed)
    for block in fixed:
        block.parameter.data.mul_(block.fixed_scale)
    try:
        yield
    finally:
        for block, weights in zip(fixed, base, strict=True):
            block.parameter.data.copy_(weights)


def fingerprint(blocks: Sequence[Block]) -> str:
    """Eight hexadecimal digits that change with any name, shape, value or fixed scale."""
    digest = hashlib.blake2b(digest_size=4)
    for block in blocks:
        digest.update(f"{block.name}{tuple(block.parameter.shape)}".encode())
        if block.state == "fixed":
            digest.update(f"{block.fixed_scale}".encode())
        digest.update(block.parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
