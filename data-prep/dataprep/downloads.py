"""Fetches published files by their address and checks every byte before anybody reads them.

A file grows in the cache as `.partial-NAME` and gets its name once its digest is right. What
arrived before an interruption stays there: the next attempt, or the next run, asks for the rest.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from dataprep import DataPrepError
from dataprep.checksums import check_file

log = logging.getLogger(__name__)

ATTEMPTS = 5  # in a row that bring nothing new, before giving up
PAUSE_SECONDS = 1.0  # before the second attempt; doubled before each one after it
TIMEOUTS_SECONDS = (15.0, 60.0)  # to connect; between two pieces of an answer

_CHUNK_BYTES = 16 * 1024  # what may be lost when a transfer breaks off
_ELSEWHERE = "Check the network, or name an address or a folder that holds the file with --mirror."
_REFETCH = "Delete it and run the same command again to fetch it again."


@dataclass(frozen=True)
class SourceFile:
    """One published file.

    Attributes:
        address: where it is published. What follows the last slash is the file's name, also in a
            mirror.
        digest: "ALGORITHM:HEX", see `checksums.file_digest`.
    """

    address: str
    digest: str

    @property
    def filename(self) -> str:
        return self.address.rpartition("/")[2]


def obtain_files(files: Iterable[SourceFile], cache: Path, mirror: str | None) -> dict[str, Path]:
    """Return the paths of verified files by their names, fetching what is not there.

    Args:
        cache: the folder that fetched files are kept in.
        mirror: a folder or an address that holds the files under their names. Those of a folder
            are read where they are; those of an address are fetched from there.

    Raises:
        DataPrepError: a file is missing, does not match its pin, or cannot be fetched.
    """
    local = mirror is not None and "://" not in mirror
    folder = Path(str(mirror)) if local else cache
    paths = {file.filename: folder / file.filename for file in files}
    for file in files:
        path = paths[file.filename]
        if local:
            remedy = f"Put {file.filename} as published at {file.address} into that folder."
            check_file(path, file.digest, remedy)
        elif path.exists():
            check_file(path, file.digest, _REFETCH)
        else:
            _download(file, mirror, path)
    return paths


def _download(file: SourceFile, mirror: str | None, final: Path) -> None:
    address = file.address if mirror is None else f"{mirror.rstrip('/')}/{file.filename}"
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".partial-{final.name}")
    _complete(address, partial)
    try:
        check_file(partial, file.digest, f"It came from {address}; --mirror names another place.")
    except DataPrepError:
        partial.unlink()
        raise
    partial.rename(final)


def _complete(address: str, partial: Path) -> None:
    """Append what a partial file lacks, resuming wherever a transfer breaks off.

    Raises:
        DataPrepError: it cannot be fetched.
    """
    furthest, in_vain = 0, 0
    while True:
        try:
            _append(address, partial)
            return
        except (requests.RequestException, HTTPError) as error:
            reached = partial.stat().st_size if partial.exists() else 0
            in_vain = 0 if reached > furthest else in_vain + 1
            furthest = max(furthest, reached)
            if in_vain == ATTEMPTS:
                raise DataPrepError(
                    f"{address} could not be fetched: {error}. {_ELSEWHERE}"
                ) from error
            log.info("%s: broke off after %s bytes (%s)", address, f"{reached:,}", error)
        time.sleep(PAUSE_SECONDS * 2**in_vain)


def _append(address: str, partial: Path) -> None:
    """Ask once for what a partial file lacks, and append it.

    Raises:
        requests.RequestException, HTTPError: not all of it came; it may be asked for again.
        DataPrepError: the server has no such file.
    """
    start = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    log.info("fetching %s from byte %s", address, f"{start:,}")
    with requests.get(address, headers=headers, stream=True, timeout=TIMEOUTS_SECONDS) as response:
        status = response.status_code
        if start and status == 416:  # nothing follows; the digest tells whether it is the file
            return
        if 400 <= status < 500 and status != 429:
            raise DataPrepError(
                f"{address} could not be fetched: the server answered {status} {response.reason}. "
                f"{_ELSEWHERE}"
            )
        response.raise_for_status()
        start = start if status == 206 else 0
        rest = response.raw.length_remaining
        with (
            partial.open("ab" if start else "wb") as out,
            tqdm(
                initial=start,
                total=None if rest is None else start + rest,
                desc=address.rpartition("/")[2],
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar,
        ):
            # Undecoded: some servers call a .tgz a tar file in gzip encoding.
            for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
                out.write(chunk)
                bar.update(len(chunk))
