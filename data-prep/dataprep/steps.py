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
from dataprep.checksums import file_digest

log = logging.getLogger(__name__)

RECORD = "step.json"


@dataclass(frozen=True)
class StepRecord:
    """What a finished step leaves beside its files.

    Attributes:
        fingerprint: a hash of everything that decided the outcome.
        files: the SHA-256 of each file of the folder, by its name.
        report: what the step said about its work, in JSON's types.
    """

    fingerprint: str
    files: dict[str, str]
    report: Any


def run_step(
    folder: Path, ingredients: Mapping[str, object], work: Callable[[Path], object]
) -> StepRecord:
    """Make sure that `folder` holds the outcome of a step, doing the step only if it must.

    Args:
        folder: where the outcome belongs. Its name is the step's name.
        ingredients: all that decides the outcome beside this package's code: hashes of inputs,
            options, versions of tools. With others, or with a changed file, it is done again.
        work: does the step, in the folder that it is given, and returns its report.

    Raises:
        DataPrepError: `folder` exists and was not made by such a step.
    """
    fingerprint = _fingerprint(ingredients)
    done = _finished(folder, fingerprint)
    if done is not None:
        log.info("step %s: finished before, skipped", folder.name)
        return done
    if folder.exists() and not (folder / RECORD).exists():
        raise DataPrepError(
            f"{folder} exists and was not made by this program. Move it away, or choose another "
            "--out."
        )
    log.info("step %s: started", folder.name)
    for abandoned in folder.parent.glob(f".partial-{folder.name}-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    # With the process in its name, it cannot be the one that a child of a killed run still fills.
    partial = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    partial.mkdir(parents=True)
    start = time.monotonic()
    report = work(partial)
    files = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
    record = StepRecord(fingerprint, files, report)
    write_json(partial / RECORD, asdict(record))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    log.info("step %s: done in %.0f s", folder.name, time.monotonic() - start)
    return record


def _fingerprint(ingredients: Mapping[str, object]) -> str:
    """A hash of them and of this package's source: a changed filter redoes what it decides."""
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _finished(folder: Path, fingerprint: str) -> StepRecord | None:
    try:
        record = StepRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        fits = record.fingerprint == fingerprint and all(
            file_digest(folder / name) == sha for name, sha in record.files.items()
        )
    except (OSError, ValueError, TypeError):
        return None
    return record if fits else None


def write_json(path: Path, content: object) -> None:
    """Write JSON for people to read; the file appears under its name only when it is whole."""
    partial = path.with_name(f".partial-{path.name}")
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
