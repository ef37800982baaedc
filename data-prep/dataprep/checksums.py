"""Checks files against their digests, and keeps apart those that are not whole yet."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dataprep import DataPrepError

REFETCH = "Delete it and run the same command again to fetch it again."

# What a digest may be made with, and what people call it.
_ALGORITHMS = {"sha256": "SHA-256", "md5": "MD5", "git-sha1": "SHA-1 of git"}


def file_digest(path: Path, algorithm: str) -> str:
    """The digest of a file, in hexadecimal.

    Args:
        path: the file.
        algorithm: "sha256", "md5", or "git-sha1", by which git names a file's content.

    Raises:
        OSError: the file cannot be read.
    """
    # Some systems refuse the older ones, except for uses like this: whether a download went well.
    digest = hashlib.new(algorithm.removeprefix("git-"), usedforsecurity=False)
    if algorithm == "git-sha1":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: digest).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    return file_digest(path, "sha256")


def check_file(path: Path, digest: str, remedy: str, called: str | None = None) -> None:
    """Compare a file with its pin.

    Args:
        path: the file.
        digest: "ALGORITHM:HEX", see `file_digest`; HEX alone is a SHA-256.
        remedy: the sentence that tells the user what to do if it is another file.
        called: what the user knows the file by, if not by its path.

    Raises:
        DataPrepError: the file cannot be read, or is not, byte for byte, the pinned one.
    """
    prefix, _, expected = digest.rpartition(":")
    algorithm = prefix or "sha256"
    try:
        found = file_digest(path, algorithm)
    except OSError as error:
        raise DataPrepError(f"{path} cannot be read ({error.strerror}). {remedy}") from error
    if found != expected:
        raise DataPrepError(
            f"{called or path} is not the pinned file: expected {_ALGORITHMS[algorithm]} "
            f"{expected}, found {found} ({path.stat().st_size:,} bytes). {remedy}"
        )


@contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """A folder inside `cache` for files that are not whole yet; those of killed runs go."""
    cache.mkdir(parents=True, exist_ok=True)
    for abandoned in cache.glob(".partial-*/"):  # folders only: files are downloads to resume
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as scratch:
        yield Path(scratch)
