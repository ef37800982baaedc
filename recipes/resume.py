"""How far a run was trained, by its checkpoints.

    python recipes/resume.py CHECKPOINTS

Prints the updates of the last checkpoint, 0 without one. fairseq-train writes each checkpoint under
another name first, and then copies it to checkpoint_last.pt; a kill during that copy leaves a file
that cannot be read. It is replaced by the newest checkpoint of --save-interval-updates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from average_checkpoints import interval_checkpoints

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.safe_loading import BrokenCheckpoint, read_checkpoint
from fairseq_gradinit.storage import write_atomically


class CannotResume(Exception):
    """The message says why, and what to do."""


def updates_of(checkpoint: Path) -> int | None:
    """After how many updates it was written; None if the file is not whole.

    Raises:
        GradInitError: it cannot be read.
    """
    try:
        state = read_checkpoint(checkpoint)
    except BrokenCheckpoint:
        return None
    return int(state["optimizer_history"][-1]["num_updates"])


def trained_updates(folder: Path) -> int:
    """Updates of the last checkpoint in the folder, mended where a kill has broken it.

    Raises:
        CannotResume: it is broken, and there is no other to go on from.
        GradInitError: a file cannot be read, or the last one cannot be written.
        OSError: the checkpoint to go on from cannot be copied.
    """
    last = folder / "checkpoint_last.pt"
    if not last.exists():
        return 0
    updates = updates_of(last)
    if updates is not None:
        return updates
    for checkpoint in reversed(interval_checkpoints(folder)):
        updates = updates_of(checkpoint)
        if updates is not None:
            write_atomically(last, checkpoint.read_bytes())
            return updates
    raise CannotResume(
        f"{last} is broken, and no other checkpoint is there to go on from: remove it, and "
        "training begins anew"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("checkpoints", type=Path)
    options = parser.parse_args(arguments)
    try:
        print(trained_updates(options.checkpoints))
    except (CannotResume, GradInitError, OSError) as error:
        print(f"resume: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
