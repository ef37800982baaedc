"""Fetches Debian packages with apt-get and reads them in memory; nothing is installed.

A package is an ar archive of two compressed tar archives, control.tar and data.tar. No member is
ever written to disk and no member's name becomes a path, so that a hostile name can do no harm.
"""

import gzip
import importlib
import io
import logging
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from dataprep import DataPrepError
from dataprep.checksums import scratch_folder

log = logging.getLogger(__name__)

# The manuals unpack to 35 MB at most. What has far more is none, and might exhaust the memory.
MAX_UNPACKED_BYTES = 256 * 1024 * 1024

_ELSEWHERE = "from packages.debian.org or from any Debian or Ubuntu mirror"


def obtain_packages(
    names: Sequence[str], cache: Path, local: Path | None = None
) -> dict[str, Path]:
    """Return one file for each package, fetching what is not there.

    There is no SHA-256 to compare them with, because every release of a distribution has a version
    of its own. What apt-get fetches, it checks against its signed index; what lies in a folder is
    taken as it is. The caller should write down which files they were.

    Args:
        names: of parts of one program, whose upstream versions must be the same.
        cache: the folder that fetched packages are kept in.
        local: a folder that holds all of them, as NAME_VERSION_ARCHITECTURE.deb; nothing is
            fetched then.

    Returns:
        The path of each package, by its name.

    Raises:
        DataPrepError: a package is missing from `local`, cannot be fetched or read, or is of
            another upstream version than the rest.
    """
    missing = [name for name in names if local is None and not _files(cache, name)]
    if missing:
        _download(missing, cache)
    paths = {name: _only_file(cache if local is None else local, name) for name in names}
    for name, path in paths.items():
        log.info("package %s: %s", path.name, "fetched" if name in missing else "already here")
    _check_versions(paths)
    return paths


def package_version(path: Path) -> str:
    """The version in a package's control data, such as "4:7.4.7-1+deb12u14".

    Raises:
        DataPrepError: the package cannot be read, or states no version.
    """
    members = _tar_members(path, "control.tar", lambda name: name == "control")
    control = b"".join(content for _, content in members).decode("utf-8", errors="replace")
    version = _python_debian("deb822").Deb822(control).get("Version")
    if not version:
        raise DataPrepError(f"{path} is not a Debian package: its control data state no version.")
    return str(version)


def read_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of files in a package, in the package's order.

    Links, devices and folders are passed over.

    Args:
        path: the package.
        wanted: decides by the name, such as "usr/share/doc/NAME/copyright".

    Raises:
        DataPrepError: the package cannot be read, is damaged, or unpacks to too much.
    """
    return _tar_members(path, "data.tar", wanted)


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
            os.replace(file, cache / file.name)


def _complaint(stderr: str) -> str:
    """The last error that apt-get reports; its warnings, such as of running as root, come last."""
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in reversed(lines) if line.startswith("E:")), lines[-1])[
        :300
    ].rstrip(".")


def _check_versions(paths: Mapping[str, Path]) -> None:
    """Refuse packages whose upstream versions differ; their revisions may."""
    versions = {name: package_version(path) for name, path in paths.items()}
    if len({_upstream(version) for version in versions.values()}) > 1:
        found = " but ".join(f"{name} {version}" for name, version in versions.items())
        folders = " and ".join(sorted({str(path.parent) for path in paths.values()}))
        raise DataPrepError(
            f"The packages are of different versions, which do not fit together: {found}. Delete "
            f"the older one in {folders}, and fetch it anew or put the other's version there."
        )


def _upstream(version: str) -> str:
    """A version without its epoch and the distribution's revision."""
    try:
        return str(_python_debian("debian_support").Version(version).upstream_version)
    except ValueError:  # not after Debian's rules
        return version


def _tar_members(
    path: Path, part: str, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    content = io.BytesIO(_unpacked(path, part))
    try:
        with tarfile.open(fileobj=content, mode="r:") as archive:
            before = -1
            for member in archive:
                if member.offset <= before:  # tarfile would go in circles, led by negative sizes
                    raise tarfile.ReadError(f"{member.name} leads back to what was read")
                before = member.offset
                name = member.name.removeprefix("./")
                # A sparse file is small in the archive and as large as it likes outside.
                if member.isreg() and not member.issparse() and wanted(name):
                    data = archive.extractfile(member)
                    assert data is not None  # as for every regular file
                    yield name, data.read()
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _unpacked(path: Path, part: str) -> bytes:
    """One of the two tar archives in a package, decompressed.

    Raises:
        DataPrepError: the package cannot be read, is damaged, or unpacks to too much.
    """
    arfile = _python_debian("arfile")
    try:
        with _ForwardFile(path) as stream:
            members = arfile.ArFile(fileobj=stream).getmembers()
            found = [member for member in members if member.name.startswith(part)]
            if len(found) != 1:
                raise arfile.ArError(f"it has {len(found)} members called {part}")
            suffix, compressed = found[0].name.removeprefix(part), found[0].read()
        if suffix not in _DECOMPRESSORS:
            raise arfile.ArError(f"{found[0].name} is compressed in an unknown way")
        content = _DECOMPRESSORS[suffix](compressed)
    except (arfile.ArError, OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise _unreadable(path, error) from error
    if len(content) > MAX_UNPACKED_BYTES:
        raise DataPrepError(
            f"{part} in {path} has more than the {MAX_UNPACKED_BYTES:,} bytes that a package of "
            "text may have. Take the package that the distribution publishes."
        )
    return content


class _ForwardFile(io.FileIO):
    """A file that python-debian cannot be led back in, for ever, by a member of negative size."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR and offset < 0:
            raise OSError("a member has a negative size")
        return super().seek(offset, whence)


def _gunzip(compressed: bytes) -> bytes:
    return gzip.open(io.BytesIO(compressed)).read(MAX_UNPACKED_BYTES + 1)


def _unxz(compressed: bytes) -> bytes:
    return lzma.open(io.BytesIO(compressed)).read(MAX_UNPACKED_BYTES + 1)


def _unzstd(compressed: bytes) -> bytes:
    """What python-debian does, but with a limit: it would read all that comes into memory."""
    with tempfile.TemporaryFile() as source:
        source.write(compressed)
        source.seek(0)
        try:
            process = subprocess.Popen(
                ["unzstd", "--stdout"],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except FileNotFoundError as error:
            raise DataPrepError(
                "The packages are compressed by zstd, as Ubuntu's are, and the program unzstd is "
                "not on this machine. Install zstd, or name a folder with Debian's packages, "
                "which do without it, with --mirror."
            ) from error
        with process:
            assert process.stdout is not None
            content = process.stdout.read(MAX_UNPACKED_BYTES + 1)
    if process.returncode != 0 and len(content) <= MAX_UNPACKED_BYTES:
        raise ValueError("unzstd reports damage")
    return content


_DECOMPRESSORS: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": _gunzip,
    ".xz": _unxz,
    ".zst": _unzstd,
}


def _python_debian(module: str) -> ModuleType:
    """A module of python-debian, imported late since other corpora do without it."""
    try:
        return importlib.import_module(f"debian.{module}")
    except ImportError as error:
        raise DataPrepError(
            f"python-debian, which reads packages, is not installed for {sys.executable}. Install "
            "it with pip."
        ) from error


def _unreadable(path: Path, error: Exception) -> DataPrepError:
    return DataPrepError(
        f"{path} cannot be read as a Debian package: {error}. Delete it and fetch it anew."
    )
