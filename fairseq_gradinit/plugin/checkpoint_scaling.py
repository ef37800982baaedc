"""Scales applied to the weights in a checkpoint, for trainers that do not load the plugin."""

from __future__ import annotations

import io
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_gradinit.engine import Block
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.safe_loading import read_checkpoint
from fairseq_gradinit.scales import Scales, scales_file
from fairseq_gradinit.storage import write_atomically

logger = logging.getLogger(__name__)

CRITERION = "criterion."
"""What the names of a criterion's tensors begin with in a scales file."""


def add_apply(parser: ArgumentParser) -> None:
    """Make a parser that of `fairseq-gradinit apply`."""
    parser.description = (
        "Write a copy of a checkpoint whose weights are multiplied by the scales, for trainers "
        "that do not load the plugin. LayerNorms are not centered: that takes training data."
    )
    parser.add_argument(
        "scales", type=Path, metavar="SCALES", help="the --save-dir of a run, or a scales file"
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="of fairseq, with the initial weights; or a file with a model's state dict",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="NEW.pt")
    parser.set_defaults(run=apply_scales)


def apply_scales(options: Namespace) -> None:
    """Write the copy.

    Raises:
        GradInitError: a file cannot be used, or the scales do not fit.
    """
    scales = Scales.load(scales_file(options.scales))
    count = scale_checkpoint(scales, options.checkpoint, options.out)
    print(f"{options.out}: {count} tensors multiplied by their scales")


def scale_checkpoint(scales: Scales, checkpoint: Path, out: Path) -> int:
    """Write a copy of a checkpoint whose weights are multiplied by the scales.

    What else is in it stays as it is. A tensor that has no scale of its own but is equal to one
    that has, as tied embeddings are, gets the same.

    Args:
        checkpoint: of fairseq, or a file with nothing but a model's state dict.

    Returns:
        How many tensors were multiplied, tied ones counted each.

    Raises:
        GradInitError: a file cannot be read or written, or the scales are for another model;
            `out` is not touched then.
    """
    if out.exists() and out.resolve() == checkpoint.resolve():
        raise GradInitError(f"{out} is the checkpoint itself: choose another name for --out")
    document = read_checkpoint(checkpoint)
    found = _state_dicts(document, checkpoint)
    changed = _scaled(scales, {name: tensor for name, _, tensor in _tensors(found)})
    for name, (state_dict, key), _ in list(_tensors(found)):
        if name in changed:
            state_dict[key] = changed[name]
    _warn(scales, document, checkpoint)
    content = io.BytesIO()
    torch.save(document, content)
    write_atomically(out, content.getvalue())
    return len(changed)


def _state_dicts(document: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The state dicts of a checkpoint by what the names of their tensors begin with."""
    extra = document.get("extra_state")
    if isinstance(extra, Mapping) and "ema" in extra:
        raise GradInitError(
            f"{path} has a moving average of the weights beside them, which scales do not fit: "
            "train with --gradinit-scales instead"
        )
    model, criterion = document.get("model", document), document.get("criterion")
    found = {"": model, CRITERION: criterion if isinstance(criterion, dict) else {}}
    if not isinstance(model, dict) or not any(isinstance(v, Tensor) for v in model.values()):
        raise GradInitError(f"{path} is no checkpoint: there are no weights of a model in it")
    return found


def _tensors(
    found: Mapping[str, dict[str, Any]],
) -> Iterator[tuple[str, tuple[dict[str, Any], str], Tensor]]:
    for prefix, state_dict in found.items():
        for key, value in state_dict.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield f"{prefix}{key}", (state_dict, key), value


def _scaled(scales: Scales, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that have a scale, or are tied to one that has, multiplied by it."""
    names = [block.name for block in scales.blocks if block.name in tensors]
    blocks = [Block(n, nn.Parameter(tensors[n].clone(), False), "learned") for n in names]
    scales.apply(blocks)
    changed = {block.name: block.parameter.data for block in blocks}
    named = set(names)
    for name in tensors.keys() - named:
        twin = next((n for n in names if _tied(tensors[n], tensors[name])), None)
        if twin is not None:
            changed[name] = changed[twin]
    return changed


def _tied(one: Tensor, other: Tensor) -> bool:
    """Random weights are equal only if they are the same; what is constant may be by chance."""
    same = one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return same and bool((one != one.flatten()[0]).any())


def _warn(scales: Scales, document: dict[str, Any], path: Path) -> None:
    history = document.get("optimizer_history")
    updates = history[-1].get("num_updates", 0) if isinstance(history, list) and history else 0
    if updates:
        logger.warning(
            "%s has been trained for %s updates: scales are learned for the weights before the "
            "first one",
            path,
            updates,
        )
    if scales.centered:
        logger.warning(
            "these scales were learned with centered LayerNorms, which takes training data and is "
            "not done here: fairseq-train --gradinit --gradinit-scales FILE does it"
        )
