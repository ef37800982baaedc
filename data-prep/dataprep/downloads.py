"""Fetches published files by their address and checks every byte before anybody reads them."""

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from dataprep import DataPrepError
from dataprep.corpora import SourceFile
from dataprep.wheels import REFETCH, check_file, scratch_folder

log = logging.getLogger(__name__)


def obtain_files(
    files: Iterable[SourceFile], cache: Path, mirror: str | None = None
) -> dict[str, Path]:
    """Return verified files, fetching what is not there.

    Args:
        files: the pins.
        cache: the folder that fetched files are kept in.
        mirror: a folder or an address that holds the files under their names. Those of a folder
            are read where they are; those of an address are fetched from there.

    Returns:
        The path of each file, by its name.

    Raises:
        DataPrepError: a file is missing, does not match its pin, or cannot be fetched.
    """
    files = tuple(files)
    if mirror is not None and "://" not in mirror:
        folder = Path(mirror)
        for file in files:
            check_file(
                folder / file.filename,
                file.sha256,
                f"Put {file.filename} as published at {file.address} into that folder, or leave "
                "--mirror out to fetch it.",
            )
        return {file.filename: folder / file.filename for file in files}
    for file in files:
        path = cache / file.filename
        if path.exists():
            check_file(path, file.sha256, REFETCH)
            log.info("file %s: already here", file.filename)
        else:
            address = file.address if mirror is None else f"{mirror.rstrip('/')}/{file.filename}"
            _download(address, file, cache)
            log.info("file %s: fetched from %s", file.filename, address)
    return {file.filename: cache / file.filename for file in files}


def _download(address: str, file: SourceFile, cache: Path) -> None:
    """Fetch a file into `cache`; it gets its final name only once it is whole and checked."""
    try:
        from pooch import HTTPDownloader  # here, since corpora out of wheels do without it
    except ImportError as error:
        raise DataPrepError(
            f"pooch, which fetches files, is not installed for {sys.executable}. Install it with "
            "pip, or fetch the files elsewhere and name their folder with --mirror."
        ) from error
    # What is asked for is the file, not a compressed form of it that would be undone on the way.
    download = HTTPDownloader(
        progressbar=sys.stderr.isatty(), headers={"Accept-Encoding": "identity"}
    )
    with scratch_folder(cache) as scratch:
        partial = scratch / file.filename
        try:
            download(address, str(partial), None)
        except OSError as error:  # all that requests raises is one
            raise DataPrepError(
                f"{address} could not be fetched: {_root_cause(error)}. Check the network, or name "
                "an address or a folder that holds the file with --mirror."
            ) from error
        check_file(
            partial,
            file.sha256,
            "It was changed there or on the way; --mirror names another place to fetch it from.",
            called=address,
        )
        os.replace(partial, cache / file.filename)


def _root_cause(error: BaseException) -> BaseException:
    """The refused connection, say, that urllib3 and requests wrap several times."""
    while error.__context__ is not None:
        error = error.__context__
    return error
