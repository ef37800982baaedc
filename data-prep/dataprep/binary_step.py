"""The step that makes data-bin/, by fairseq-preprocess."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dataprep import DataPrepError
from dataprep.steps import Report


def make_binary(
    folder: Path,
    subwords: Path,
    direction: tuple[str, str],
    parts: Sequence[str],
    dictionary: Path | None,
    joined: bool,
    workers: int,
) -> Report:
    """Have fairseq-preprocess binarise the parts in `subwords`.

    Args:
        folder: to write to.
        direction: source and target language.
        parts: train, valid, test and any further test sets.
        dictionary: of both languages; None to make it of what occurs in training.
        joined: whether both languages share the one that is made.

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
    result = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataPrepError(
            f"fairseq-preprocess failed: {last[:300]} Check that fairseq is installed for "
            f"{sys.executable}."
        )
    # It holds times and paths, by which two runs would differ.
    (folder / "preprocess.log").unlink(missing_ok=True)
    # It numbers test sets. A name serves --gen-subset as well, and says which one it is.
    for number, name in enumerate(tests[1:], start=1):
        for path in folder.glob(f"test{number}.*"):
            path.rename(folder / path.name.replace(f"test{number}", name, 1))
    dictionaries = {path.name: path for path in sorted(folder.glob("dict.*.txt"))}
    return {"dictionaries": {name: _entries(path) for name, path in dictionaries.items()}}


def _entries(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(1 for _ in stream)


def fairseq_version() -> str:
    """The installed fairseq, whichever distribution brought it.

    Raises:
        DataPrepError: there is none.
    """
    distributions = importlib.metadata.packages_distributions().get("fairseq")
    if not distributions:
        raise DataPrepError(
            f"fairseq is not installed for {sys.executable}. Install it as the README says, then "
            "run the same command again: what is done so far is kept."
        )
    return f"{distributions[0]} {importlib.metadata.version(distributions[0])}"
