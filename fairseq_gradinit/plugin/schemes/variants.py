"""Architectures of ours that differ from a stock one in how the built model is changed.

Each has a name of its own, under which its checkpoints are loaded: they need
`--user-dir fairseq_gradinit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
    MODEL_REGISTRY,
    register_model,
    register_model_architecture,
)
from fairseq.models.transformer import TransformerModel, transformer_legacy
from fairseq.models.transformer_lm import TransformerLanguageModel
from omegaconf import OmegaConf, open_dict
from torch import nn

from fairseq_gradinit.errors import GradInitError

STOCK: dict[str, Any] = {
    "transformer": TransformerModel,
    "transformer_lm": TransformerLanguageModel,
}
"""fairseq's models that have variants."""


def register_variants(
    scheme: str, change: Callable[[nn.Module], None], of: Sequence[str] = tuple(STOCK)
) -> None:
    """Register `transformer_SCHEME` and `transformer_lm_SCHEME`.

    Args:
        scheme: its name, with underscores.
        change: what is done to each model when it is built.
        of: the stock models that have this variant.
    """
    for name in of:
        stock = STOCK[name]
        variant = f"{name}_{scheme}"
        register_model(variant, dataclass=MODEL_DATACLASS_REGISTRY.get(name))(
            _subclass(stock, variant, change)
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


def switch(model: Any, scheme: str) -> None:
    """Have a model's configuration build the scheme's variant, with the sizes that it has.

    Args:
        model: fairseq's configuration of the model: a Namespace, or a DictConfig.
        scheme: as in `register_variants`.

    Raises:
        GradInitError: it is of a class that has no such variant.
    """
    name = str(given(model, "_name") or given(model, "arch"))
    found = ARCH_MODEL_REGISTRY.get(name)
    variants = {key: f"{key}_{scheme}" for key in STOCK if f"{key}_{scheme}" in MODEL_REGISTRY}
    if any(found is MODEL_REGISTRY[variant] for variant in variants.values()):
        return
    stock = next((key for key in variants if found is STOCK[key]), None)
    if stock is None:
        raise GradInitError(
            f"--init-scheme {scheme.replace('_', '-')} changes fairseq's models "
            f"{' and '.join(variants)} (--arch {', '.join(f'{key}...' for key in variants)}), and "
            f"--arch {name} is another model: choose one of these"
        )
    with writable(model):
        if stock not in MODEL_DATACLASS_REGISTRY:
            ARCH_CONFIG_REGISTRY[name](model)
        for key in ("_name", "arch"):
            if given(model, key) is not None:
                setattr(model, key, variants[stock])


def require_post_ln(model: Any, scheme: str) -> None:
    """Refuse a configuration with LayerNorm before the sublayers.

    Raises:
        GradInitError: it has one.
    """
    for side in ("encoder", "decoder"):
        if given(model, f"{side}_normalize_before"):
            raise GradInitError(
                f"--init-scheme {scheme} is for post-LN models, and this {side} has LayerNorm "
                f"before its sublayers: choose an --arch without --{side}-normalize-before"
            )


def given(model: Any, key: str) -> Any:
    """The value of a key in a model's configuration, None if there is none."""
    return getattr(model, key, None)


@contextmanager
def writable(model: Any) -> Iterator[None]:
    """Allow changes to a model's configuration, of whichever type it is."""
    if OmegaConf.is_config(model):
        with open_dict(model):
            yield
    else:
        yield
