"""Checks files against their digests."""

import hashlib
from pathlib import Path

from dataprep import DataPrepError


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """The digest of a file, in hexadecimal.

    Args:
        algorithm: "sha256", "md5", or "git-sha1", by which git names a file's content.
    """
    # Some systems refuse the older ones, except for uses like this: whether a download went well.
    digest = hashlib.new(algorithm.removeprefix("git-"), usedforsecurity=False)
    if algorithm == "git-sha1":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: digest).hexdigest()


def check_file(path: Path, digest: str, remedy: str) -> None:
    """Compare a file with its pin.

    Args:
        digest: "ALGORITHM:HEX", see `file_digest`.
        remedy: the sentence that tells the user what to do if it is another file.

    Raises:
        DataPrepError: the file cannot be read, or is not, byte for byte, the pinned one.
    """
    algorithm, _, expected = digest.partition(":")
    try:
        found = file_digest(path, algorithm)
    except OSError as error:
        raise DataPrepError(f"{path} cannot be read ({error.strerror}). {remedy}") from error
    if found != expected:
        raise DataPrepError(
            f"{path} is not the pinned file: expected {algorithm} {expected}, found {found} "
            f"({path.stat().st_size:,} bytes). {remedy}"
        )
