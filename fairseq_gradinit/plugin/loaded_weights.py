"""Parameter tensors that a model loads from files while fairseq builds it.

These are embeddings (--encoder-embed-path) and whole components (--load-pretrained-encoder-from).
A learned scale makes the most of weights that an initialiser drew; it would spoil trained ones.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from fairseq import utils
from torch import nn

_MARK = "_gradinit_loaded"


def note_loaded_weights(task: Any) -> None:
    """Have `build_model` of fairseq's `task` mark the parameters that it loads from files.

    That is what torch's `load_state_dict` or fairseq's `load_embedding` fills.
    """
    build_model = task.build_model
    load_state_dict, load_embedding = nn.Module.load_state_dict, utils.load_embedding

    def marking_state_dict(module: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_state_dict(module, state_dict, *args, **kwargs)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name in state_dict:
                setattr(parameter, _MARK, True)
        return result

    def marking_embedding(embed_dict: Any, vocab: Any, embedding: Any) -> Any:
        setattr(embedding.weight, _MARK, True)
        return load_embedding(embed_dict, vocab, embedding)

    @functools.wraps(build_model)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with (
            patch.object(nn.Module, "load_state_dict", marking_state_dict),
            patch.object(utils, "load_embedding", marking_embedding),
        ):
            return build_model(*args, **kwargs)

    task.build_model = wrapper


def loaded_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of the parameters that were marked; `modules` are those of `collect_blocks`."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if hasattr(parameter, _MARK)
    ]
