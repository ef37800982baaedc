"""Steps that are done once, can be interrupted at any moment, and are redone when input changes.

A step fills one folder. It works in a folder of another name, which gets its final name in one
move, together with a record of what it was made from: a folder under its final name is whole.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataprep import DataPrepError
from dataprep.checksums import file_sha256

log = logging.getLogger(__name__)

RECORD = "step.json"

Report = dict[str, Any]
"""What a step has to say about its work, in JSON's types."""


@dataclass(frozen=True)
class StepRecord:
    """What a finished step leaves beside its files.

    Attributes:
        fingerprint: a hash of everything that decided the outcome.
        files: the SHA-256 of each file of the folder, by its name.
        report: what the step said.
    """

    fingerprint: str
    files: dict[str, str]
    report: Report


def code_fingerprint() -> str:
    """A hash of this package's source, so that a changed filter redoes what it decides."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def fingerprint(ingredients: Mapping[str, object]) -> str:
    """A hash of named values of JSON's types."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def finished_step(folder: Path, ingredients: Mapping[str, object]) -> StepRecord | None:
    """The record of a step that was done before, or None if it has to be done.

    Args:
        folder: the step's.
        ingredients: as for `run_step`; with others, or with a changed file, it is done again.
    """
    try:
        record = StepRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        fits = record.fingerprint == fingerprint(ingredients) and all(
            file_sha256(folder / name) == sha for name, sha in record.files.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    if not fits:
        return None
    log.info("step %s: finished before, skipped", folder.name)
    return record


def run_step(
    folder: Path, ingredients: Mapping[str, object], work: Callable[[Path], Report]
) -> StepRecord:
    """Make sure that `folder` holds the outcome of a step, doing the step only if it must.

    Args:
        folder: where the outcome belongs. Its name is the step's name.
        ingredients: all that decides the outcome: hashes of inputs, options, versions of tools.
        work: does the step, in the folder that it is given, and returns its report.

    Returns:
        The record of the step, now done or done before.

    Raises:
        DataPrepError: `folder` exists and was not made by such a step.
    """
    done = finished_step(folder, ingredients)
    if done is not None:
        return done
    changed = (folder / RECORD).exists()
    log.info(
        "step %s: %s", folder.name, "inputs or outputs changed, redone" if changed else "started"
    )
    for abandoned in folder.parent.glob(f".partial-{folder.name}-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    # With the process in its name, it cannot be the one that a child of a killed run still fills.
    partial = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    partial.mkdir(parents=True)
    start = time.monotonic()
    report = work(partial)
    files = {path.name: file_sha256(path) for path in sorted(partial.iterdir())}
    record = StepRecord(fingerprint(ingredients), files, report)
    write_json(partial / RECORD, asdict(record))
    _replace_folder(partial, folder)
    log.info("step %s: done in %.0f s", folder.name, time.monotonic() - start)
    return record


def write_json(path: Path, content: object) -> None:
    """Write JSON for people to read; the file appears under its name only when it is whole."""
    partial = path.with_name(f".partial-{path.name}")
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _replace_folder(partial: Path, folder: Path) -> None:
    if folder.exists():
        if any(folder.iterdir()) and not (folder / RECORD).exists():
            raise DataPrepError(
                f"{folder} exists and was not made by this program. Move it away, or choose "
                "another --out."
            )
        shutil.rmtree(folder)
    os.replace(partial, folder)
