"""LayerNorm before each sublayer instead of after it, and one more at the end of each stack.

Xiong et al., ICML 2020, section 3.1. The flags are fairseq's own, and so is the initialisation.
"""

from __future__ import annotations

from typing import Any

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.schemes.variants import given, writable

FLAGS = ("encoder_normalize_before", "decoder_normalize_before")


def configure(model: Any) -> None:
    """Set the flags of a model's configuration, those that it has.

    Raises:
        GradInitError: it has none of them.
    """
    flags = [flag for flag in FLAGS if given(model, flag) is not None]
    if not flags:
        raise GradInitError(
            "--init-scheme pre-ln sets --encoder-normalize-before and --decoder-normalize-before, "
            "and this --arch has neither: choose another, or leave --init-scheme out"
        )
    with writable(model):
        for flag in flags:
            setattr(model, flag, True)
