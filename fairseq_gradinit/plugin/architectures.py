"""Post-LN Transformers for training without warmup.

Each names itself like the stock model once its values are filled in, so that checkpoints load in a
fairseq without this plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fairseq.models import register_model_architecture
from fairseq.models.transformer import transformer_legacy as stock

MODEL = "transformer"


SIZES = {"layers": 3, "embed_dim": 256, "ffn_embed_dim": 1024, "attention_heads": 4}
TINY = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIZES.items()}

# Of each the stock architecture that it is, but for these values.
ARCHITECTURES: dict[str, tuple[Callable[[Any], None], dict[str, Any]]] = {
    # What two CPU cores train in minutes.
    "tiny": (stock.base_architecture, {**TINY, "share_all_embeddings": True}),
    # The dropout of the GradInit authors' IWSLT'14 script.
    "iwslt_de_en": (
        stock.transformer_iwslt_de_en,
        {"dropout": 0.3, "attention_dropout": 0.1, "activation_dropout": 0.1},
    ),
    "wmt_en_de": (stock.transformer_wmt_en_de, {}),
    "wmt_en_de_big": (stock.transformer_wmt_en_de_big, {}),
}


def _fill_in(args: Any, counterpart: Callable[[Any], None], values: dict[str, Any]) -> None:
    post_ln = {"encoder_normalize_before": False, "decoder_normalize_before": False}
    for name, value in {**post_ln, **values}.items():
        setattr(args, name, getattr(args, name, value))
    counterpart(args)
    for name in ("arch", "_name"):
        if getattr(args, name, None) is not None:
            setattr(args, name, MODEL)


for _name, (_counterpart, _values) in ARCHITECTURES.items():
    register_model_architecture(MODEL, f"transformer_gradinit_{_name}")(
        partial(_fill_in, counterpart=_counterpart, values=_values)
    )
