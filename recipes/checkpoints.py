"""Checkpoints of fairseq-train: how far they are, and their average.

    python recipes/checkpoints.py updates CHECKPOINTS
    python recipes/checkpoints.py average CHECKPOINTS --last 10 --output average.pt

`average` takes the last checkpoints of --save-interval-updates, named checkpoint_EPOCH_UPDATE.pt.
Its output is a fairseq checkpoint for generation: the mean in fp32, without optimizer state.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.storage import write_atomically

NAME = re.compile(r"checkpoint_\d+_(\d+)\.pt")


def interval_checkpoints(folder: Path) -> list[Path]:
    """Those of --save-interval-updates, in the order of their updates."""
    found = {int(m[1]): path for path in folder.glob("*.pt") if (m := NAME.fullmatch(path.name))}
    return [found[update] for update in sorted(found)]


def trained_updates(folder: Path) -> int:
    """Updates of the last checkpoint in the folder, 0 without one.

    fairseq-train writes each checkpoint under another name first, and then copies it to
    checkpoint_last.pt. A kill during that copy leaves a file that cannot be read; it is replaced
    by the newest of --save-interval-updates.

    Raises:
        GradInitError: it is broken, and there is no other to resume from.
    """
    last = folder / "checkpoint_last.pt"
    if not last.exists():
        return 0
    # torch takes seconds to import, and most calls find no checkpoint.
    from fairseq_gradinit.plugin.safe_loading import BrokenCheckpoint, read_checkpoint

    for checkpoint in (last, *reversed(interval_checkpoints(folder))):
        try:
            updates = int(read_checkpoint(checkpoint)["optimizer_history"][-1]["num_updates"])
        except BrokenCheckpoint:
            continue
        if checkpoint != last:
            write_atomically(last, checkpoint.read_bytes())
        return updates
    raise GradInitError(
        f"{last} is broken, and there is no other checkpoint to resume from: remove it to train "
        "from the beginning"
    )


def average(folder: Path, count: int, output: Path) -> None:
    """Write the last checkpoint with the mean of the last `count` in place of its parameters.

    Sums are in fp64 and the mean is fp32; tensors of integers are the last one's.

    Raises:
        GradInitError: there are fewer.
    """
    import torch

    from fairseq_gradinit.plugin.safe_loading import read_checkpoint

    paths = interval_checkpoints(folder)[-count:]
    if len(paths) < count:
        raise GradInitError(
            f"{folder} holds {len(paths)} checkpoints named checkpoint_EPOCH_UPDATE.pt, and "
            f"{count} are to be averaged: train for longer, save more often, or average fewer"
        )
    sums: dict[str, Any] = {}
    for path in paths:
        state = read_checkpoint(path)
        for name, tensor in state["model"].items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, 0.0) + tensor.double()
            else:
                sums[name] = tensor
    state["model"] = {
        name: (total / count).float() if total.is_floating_point() else total
        for name, total in sums.items()
    }
    state["last_optimizer_state"] = None
    # torch does not say what a disk refused.
    content = io.BytesIO()
    torch.save(state, content)
    write_atomically(output, content.getvalue())
    print(f"{output}: the mean of {', '.join(path.name for path in paths)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    updates = commands.add_parser("updates", help="print how far the last checkpoint is")
    updates.set_defaults(run=lambda given: print(trained_updates(given.checkpoints)))
    mean = commands.add_parser("average", help="average the last checkpoints")
    mean.add_argument("--last", type=int, required=True, help="how many to average")
    mean.add_argument("--output", type=Path, required=True)
    mean.set_defaults(run=lambda given: average(given.checkpoints, given.last, given.output))
    for command in (updates, mean):
        command.add_argument("checkpoints", type=Path)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (GradInitError, OSError) as error:
        print(f"checkpoints: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
