"""Fetches Debian packages with apt-get and reads them with dpkg-deb; nothing is installed."""

import io
import logging
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from dataprep import DataPrepError
from dataprep.checksums import scratch_folder

log = logging.getLogger(__name__)

_ELSEWHERE = "from packages.debian.org or from any Debian or Ubuntu mirror"


def obtain_packages(
    names: Sequence[str], cache: Path, local: Path | None = None
) -> dict[str, Path]:
    """Return one file for each package, fetching what is not there.

    There is no SHA-256 to compare them with, because every release of a distribution has a version
    of its own. What apt-get fetches, it checks against its signed index; what lies in a folder is
    taken as it is. The caller should write down which files they were.

    Args:
        names: of the packages.
        cache: the folder that fetched packages are kept in.
        local: a folder that holds all of them, as NAME_VERSION_ARCHITECTURE.deb; nothing is
            fetched then.

    Returns:
        The path of each package, by its name.

    Raises:
        DataPrepError: a package is missing from `local`, or cannot be fetched.
    """
    missing = [name for name in names if local is None and not _files(cache, name)]
    if missing:
        _download(missing, cache)
    paths = {name: _only_file(cache if local is None else local, name) for name in names}
    for name, path in paths.items():
        log.info("package %s: %s", path.name, "fetched" if name in missing else "already here")
    return paths


def package_version(path: Path) -> str:
    """The version in a package's control data, such as "4:7.4.7-1+deb12u14".

    Raises:
        DataPrepError: the package cannot be read.
    """
    return _dpkg_deb("--field", path, "Version").decode().strip()


def read_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of files in a package, in the package's order.

    Nothing is written to disk; links, devices and folders are passed over.

    Args:
        path: the package.
        wanted: decides by the name, such as "usr/share/doc/NAME/copyright".

    Raises:
        DataPrepError: the package cannot be read.
    """
    content = io.BytesIO(_dpkg_deb("--fsys-tarfile", path))
    with tarfile.open(fileobj=content, mode="r:") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isreg() and wanted(name) and (file := archive.extractfile(member)):
                yield name, file.read()


def _files(folder: Path, name: str) -> list[Path]:
    # A package's name has no underscore, so that one name's files are never another's.
    return sorted(folder.glob(f"{name}_*.deb"))


def _only_file(folder: Path, name: str) -> Path:
    files = _files(folder, name)
    if not files:
        raise DataPrepError(
            f"{folder} holds no {name}_VERSION_ARCHITECTURE.deb. Put that package there, "
            f"{_ELSEWHERE}, or leave --mirror out to fetch it with apt-get."
        )
    if len(files) > 1:
        raise DataPrepError(
            f"{folder} holds {len(files)} files of {name}: {', '.join(f.name for f in files)}. "
            "Leave only one of them there."
        )
    return files[0]


def _download(names: list[str], cache: Path) -> None:
    """Have apt-get fetch packages into `cache`; a file gets there only once it is whole."""
    remedy = f"fetch {' and '.join(names)} {_ELSEWHERE} and name their folder with --mirror."
    log.info("fetching %s with apt-get", ", ".join(names))
    with scratch_folder(cache) as scratch:
        try:
            result = subprocess.run(
                ["apt-get", "download", *names],
                cwd=scratch,
                stdin=subprocess.DEVNULL,  # it would ask whether to do without signatures
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        except FileNotFoundError as error:
            raise DataPrepError(f"There is no apt-get on this machine: {remedy}") from error
        if result.returncode != 0:
            raise DataPrepError(
                f"apt-get could not fetch {' and '.join(names)}: {_complaint(result.stderr)}. Run "
                f"`apt-get update` as root if its index is old or missing, or {remedy}"
            )
        for name in names:
            file = _only_file(scratch, name)
            file.rename(cache / file.name)


def _complaint(stderr: str) -> str:
    """The last error that apt-get reports; its warnings, such as of running as root, come last."""
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if line.startswith("E:")), lines[-1])[
        :300
    ].rstrip(".")


def check_versions(paths: Mapping[str, Path]) -> None:
    """Refuse packages whose upstream versions differ; their epochs and revisions may.

    Raises:
        DataPrepError: they differ, or one cannot be read.
    """
    versions = {name: package_version(path) for name, path in paths.items()}
    if len({re.sub(r"^\d+:|-[^-]*$", "", version) for version in versions.values()}) > 1:
        found = " but ".join(f"{name} {version}" for name, version in versions.items())
        folders = " and ".join(sorted({str(path.parent) for path in paths.values()}))
        raise DataPrepError(
            f"The packages are of different versions, which do not fit together: {found}. Delete "
            f"the older one in {folders}, and fetch it again or put the other's version there."
        )


def _dpkg_deb(option: str, path: Path, *more: str) -> bytes:
    """What dpkg-deb prints about a package.

    Raises:
        DataPrepError: the program is missing, or cannot read the package.
    """
    try:
        result = subprocess.run(
            ["dpkg-deb", option, str(path), *more], capture_output=True, check=False
        )
    except FileNotFoundError as error:
        raise DataPrepError(
            "Reading the packages needs the program dpkg-deb, which is not on this machine. "
            "Install dpkg: other distributions of Linux and Homebrew have it too."
        ) from error
    if result.returncode != 0:
        complaint = " ".join(result.stderr.decode(errors="replace").split())
        raise DataPrepError(
            f"{path} cannot be read as a Debian package: {complaint}. Delete it and fetch it again."
        )
    return result.stdout
