"""Post-LN Transformers for training without warmup.

Each names itself like the stock model once its values are filled in, so that checkpoints load in a
fairseq without this plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.models import register_model_architecture
from fairseq.models.transformer import transformer_legacy as stock

MODEL = "transformer"


def _fill(args: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(args, name, getattr(args, name, value))


def _post_ln(args: Any, counterpart: Callable[[Any], None]) -> None:
    _fill(args, encoder_normalize_before=False, decoder_normalize_before=False)
    counterpart(args)
    for name in ("arch", "_name"):
        if getattr(args, name, None) is not None:
            setattr(args, name, MODEL)


@register_model_architecture(MODEL, "transformer_gradinit_tiny")
def transformer_gradinit_tiny(args: Any) -> None:
    """3+3 layers of width 256: what two CPU cores train in minutes."""
    sizes = {"layers": 3, "embed_dim": 256, "ffn_embed_dim": 1024, "attention_heads": 4}
    both = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in sizes.items()}
    _fill(args, **both, share_all_embeddings=True)
    _post_ln(args, stock.base_architecture)


@register_model_architecture(MODEL, "transformer_gradinit_iwslt_de_en")
def transformer_gradinit_iwslt_de_en(args: Any) -> None:
    """`transformer_iwslt_de_en` with the dropout of the GradInit authors' IWSLT'14 script."""
    _fill(args, dropout=0.3, attention_dropout=0.1, activation_dropout=0.1)
    _post_ln(args, stock.transformer_iwslt_de_en)


@register_model_architecture(MODEL, "transformer_gradinit_wmt_en_de")
def transformer_gradinit_wmt_en_de(args: Any) -> None:
    """`transformer_wmt_en_de`, the base model of Vaswani et al. 2017."""
    _post_ln(args, stock.transformer_wmt_en_de)


@register_model_architecture(MODEL, "transformer_gradinit_wmt_en_de_big")
def transformer_gradinit_wmt_en_de_big(args: Any) -> None:
    """`transformer_wmt_en_de_big`, the big model of Vaswani et al. 2017."""
    _post_ln(args, stock.transformer_wmt_en_de_big)
