"""The step that makes data-bin/, by fairseq-preprocess."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dataprep.programs import run_program


def make_binary(
    folder: Path,
    subwords: Path,
    direction: tuple[str, str],
    parts: Sequence[str],
    dictionary: Path | None,
    joined: bool,
    workers: int,
) -> dict[str, int]:
    """Have fairseq-preprocess binarise the parts in `subwords`.

    Args:
        dictionary: of both languages; None to make it of what occurs in training.
        joined: whether both languages share the one that is made.

    Returns:
        The number of entries in each dictionary.

    Raises:
        DataPrepError: fairseq is not installed, or its preprocessing failed.
    """
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--workers", str(workers)]
    command += ["--source-lang", direction[0], "--target-lang", direction[1]]
    command += ["--joined-dictionary"] if joined else []
    command += ["--srcdict", str(dictionary)] if dictionary is not None else []
    command += ["--destdir", str(folder)]
    tests = [part for part in parts if part not in ("train", "valid")]
    for part, names in (("train", ["train"]), ("valid", ["valid"]), ("test", tests)):
        command += [f"--{part}pref", ",".join(str(subwords / name) for name in names)]
    run_program(command, f"Check that fairseq is installed for {sys.executable}.")
    # It holds times and paths, by which two runs would differ.
    (folder / "preprocess.log").unlink(missing_ok=True)
    # It numbers test sets. A name serves --gen-subset as well, and says which one it is.
    for number, name in enumerate(tests[1:], start=1):
        for path in folder.glob(f"test{number}.*"):
            path.rename(folder / path.name.replace(f"test{number}", name, 1))
    dictionaries = sorted(folder.glob("dict.*.txt"))
    return {path.name: path.read_bytes().count(b"\n") for path in dictionaries}
