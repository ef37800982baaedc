"""The architectures that schemes need: pre-LN, and ours, which change a stock model once built.

Ours have names of their own, under which checkpoints are loaded with `--user-dir fairseq_gradinit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
    MODEL_REGISTRY,
    register_model,
    register_model_architecture,
)
from fairseq.models.transformer import transformer_legacy
from omegaconf import OmegaConf, open_dict
from torch import nn

from fairseq_gradinit.errors import GradInitError

SIDES = ("encoder", "decoder")

STOCK = ("transformer", "transformer_lm")
"""fairseq's models that have variants."""


def register_variants(
    scheme: str, change: Callable[[nn.Module], None], of: Sequence[str] = STOCK
) -> None:
    """Register `transformer_SCHEME` and `transformer_lm_SCHEME`, whose models `change` makes."""
    for name in of:
        variant = f"{name}_{scheme}"
        register_model(variant, dataclass=MODEL_DATACLASS_REGISTRY.get(name))(
            _subclass(MODEL_REGISTRY[name], variant, change)
        )
        # A model with a dataclass registers an architecture of its own name.
        if variant not in ARCH_MODEL_REGISTRY:
            register_model_architecture(variant, variant)(transformer_legacy.base_architecture)


def _subclass(stock: Any, name: str, change: Callable[[nn.Module], None]) -> type:
    def build_model(cls: Any, args: Any, task: Any) -> Any:
        model = stock.build_model.__func__(cls, args, task)
        change(model)
        return model

    return type(name, (stock,), {"build_model": classmethod(build_model)})


def choose_pre_ln(model: Any) -> None:
    """Set those of fairseq's flags of pre-LN that a model's configuration has.

    LayerNorm is before each sublayer instead of after it, and one more at the end of each stack
    (Xiong et al., ICML 2020, section 3.1).
    """
    flags = [f"{side}_normalize_before" for side in SIDES]
    flags = [flag for flag in flags if getattr(model, flag, None) is not None]
    if not flags:
        raise GradInitError(
            "--init-scheme pre-ln sets --encoder-normalize-before and --decoder-normalize-before, "
            "and this --arch has neither: choose another, or leave --init-scheme out"
        )
    for flag in flags:
        setattr(model, flag, True)


def choose_variant(model: Any, scheme: str, post_ln: bool = True) -> None:
    """Have a model's configuration build the scheme's variant, with the sizes that it has."""
    option = f"--init-scheme {scheme.replace('_', '-')}"
    for side in SIDES if post_ln else ():
        if getattr(model, f"{side}_normalize_before", False):
            raise GradInitError(
                f"{option} is for post-LN models, and this {side} has LayerNorm before its "
                f"sublayers: choose an --arch without --{side}-normalize-before"
            )
    arch = str(getattr(model, "_name", None) or model.arch)
    variants = {name: f"{name}_{scheme}" for name in STOCK if f"{name}_{scheme}" in MODEL_REGISTRY}
    kind = ARCH_MODEL_REGISTRY.get(arch)
    stock = next((name for name in variants if kind is MODEL_REGISTRY[name]), None)
    if stock is None:
        raise GradInitError(
            f"{option} changes fairseq's models {' and '.join(variants)} "
            f"(--arch {', '.join(f'{name}...' for name in variants)}), and --arch {arch} is "
            "another model: choose one of these"
        )
    with open_dict(model) if OmegaConf.is_config(model) else nullcontext():
        if stock not in MODEL_DATACLASS_REGISTRY:
            ARCH_CONFIG_REGISTRY[arch](model)
        for key in ("_name", "arch"):
            if getattr(model, key, None) is not None:
                setattr(model, key, variants[stock])
