"""Average the parameters of the last checkpoints of a run.

    python recipes/average_checkpoints.py CHECKPOINTS --last 10 --output average.pt

The checkpoints are those that fairseq-train keeps with --save-interval-updates, named
checkpoint_EPOCH_UPDATE.pt. The output is a fairseq checkpoint for generation: the average in fp32,
without the optimizer's state.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.safe_loading import BrokenCheckpoint, read_checkpoint
from fairseq_gradinit.storage import write_atomically

NAME = re.compile(r"checkpoint_\d+_(\d+)\.pt")


class CannotAverage(Exception):
    """The message says what is missing or broken."""


def interval_checkpoints(folder: Path) -> list[Path]:
    """Those of --save-interval-updates, in the order of their updates."""
    found = {int(m[1]): path for path in folder.glob("*.pt") if (m := NAME.fullmatch(path.name))}
    return [found[update] for update in sorted(found)]


def last_checkpoints(folder: Path, count: int) -> list[Path]:
    """The checkpoints of the most updates, in the order of their updates.

    Raises:
        CannotAverage: there are fewer.
    """
    found = interval_checkpoints(folder)
    if len(found) < count:
        raise CannotAverage(
            f"{folder} holds {len(found)} checkpoints named checkpoint_EPOCH_UPDATE.pt, and "
            f"{count} are to be averaged: train for longer, save more often, or average fewer"
        )
    return found[-count:]


def average(paths: Sequence[Path]) -> dict[str, Any]:
    """The last checkpoint with the mean of all in place of its parameters.

    Sums are in fp64 and the mean is fp32; tensors of integers are the last one's.

    Raises:
        CannotAverage: a file is broken.
        GradInitError: a file cannot be read.
    """
    sums: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            state = read_checkpoint(path)
        except BrokenCheckpoint as error:
            raise CannotAverage(f"{path} is broken: remove it, and average others") from error
        for name, tensor in state["model"].items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, 0.0) + tensor.double()
            else:
                sums[name] = tensor
    state["model"] = {
        name: (total / len(paths)).float() if total.is_floating_point() else total
        for name, total in sums.items()
    }
    state["last_optimizer_state"] = None
    return state


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--last", type=int, required=True, help="how many to average")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.last < 1:
        parser.error("--last must be at least 1")
    try:
        paths = last_checkpoints(options.checkpoints, options.last)
        # torch does not say what a disk refused.
        content = io.BytesIO()
        torch.save(average(paths), content)
        write_atomically(options.output, content.getvalue())
    except (CannotAverage, GradInitError) as error:
        print(f"average_checkpoints: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: the mean of {', '.join(path.name for path in paths)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
