"""Runs other programs, and tells why one failed."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from dataprep import DataPrepError


def run_program(command: Sequence[str], remedy: str, folder: Path | None = None) -> bytes:
    """What a program prints.

    Args:
        remedy: the sentence that tells the user what to do if it fails.
        folder: where it runs.

    Raises:
        DataPrepError: the program is missing or failed.
    """
    # Without an input it cannot wait for an answer, such as whether to do without signatures.
    try:
        result = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except FileNotFoundError as error:
        raise DataPrepError(f"There is no {command[0]} on this machine. {remedy}") from error
    if result.returncode != 0:
        last_words = " ".join(result.stderr.decode(errors="replace").splitlines()[-3:])
        raise DataPrepError(f"{' '.join(command[:4])} ... failed: {last_words} {remedy}")
    return result.stdout
