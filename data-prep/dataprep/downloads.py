"""Fetches published files by their address and checks every byte before anybody reads them.

A file grows in the cache as `.partial-NAME` and gets its name once its digest is right. What
arrived before an interruption stays there: the next attempt, or the next run, asks for the rest.
"""

import fcntl
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from dataprep import DataPrepError
from dataprep.checksums import REFETCH, check_file

log = logging.getLogger(__name__)

ATTEMPTS = 5  # in a row that bring nothing new, before giving up
PAUSE_SECONDS = 1.0  # before the second attempt; doubled before each one after it
TIMEOUTS_SECONDS = (15.0, 60.0)  # to connect; between two pieces of an answer

_CHUNK_BYTES = 16 * 1024  # what may be lost when a transfer breaks off
_ELSEWHERE = "Check the network, or name an address or a folder that holds the file with --mirror."


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
        """The name under which the file is kept."""
        return self.address.rpartition("/")[2]


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
    local = mirror is not None and "://" not in mirror
    paths = {}
    for file in files:
        path = (Path(str(mirror)) if local else cache) / file.filename
        if local:
            remedy = (
                f"Put {file.filename} as published at {file.address} into that folder, or leave "
                "--mirror out to fetch it."
            )
            check_file(path, file.digest, remedy)
        elif path.exists():
            check_file(path, file.digest, REFETCH)
            log.info("file %s: already here", file.filename)
        else:
            address = file.address if mirror is None else f"{mirror.rstrip('/')}/{file.filename}"
            _download(address, file.digest, path)
            log.info("file %s: fetched from %s", file.filename, address)
        paths[file.filename] = path
    return paths


def _download(address: str, digest: str, final: Path) -> None:
    """Fetch a file; it gets its name only once it is whole and checked."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(final.parent), _session() as session:
            if not final.exists():  # else the process that was waited for has fetched it
                partial = final.with_name(f".partial-{final.name}")
                _fetch(session, address, digest, partial)
                partial.rename(final)
    except OSError as error:
        raise DataPrepError(
            f"{final} cannot be written ({error.strerror}). Make room, or name another folder with "
            "--cache. What has arrived is kept; the same command resumes there."
        ) from error


@contextmanager
def _alone_in(cache: Path) -> Iterator[None]:
    """Wait until no other process fetches files into a folder."""
    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process, which fetches files into %s", cache)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _session() -> requests.Session:
    """Asks a busy server again, and asks for files as they are stored."""
    session = requests.Session()
    retry = Retry(
        total=ATTEMPTS - 1,
        backoff_factor=PAUSE_SECONDS,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
        respect_retry_after_header=False,  # it may say hours
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    session.headers["Accept-Encoding"] = "identity"
    return session


def _fetch(session: requests.Session, address: str, digest: str, partial: Path) -> None:
    """Complete and check a partial file; if what an earlier run left is of no use, fetch it all.

    Raises:
        DataPrepError: it cannot be fetched, or is not the file that it should be.
    """
    remedy = "It was changed there or on the way; --mirror names another place to fetch it from."
    while True:
        resumed = partial.exists()
        _complete(session, address, partial)
        try:
            check_file(partial, digest, remedy, called=address)
            return
        except DataPrepError:
            partial.unlink()
            if not resumed:
                raise
        log.info("%s: the parts do not fit together, fetched again", address)


def _complete(session: requests.Session, address: str, partial: Path) -> None:
    """Append what a partial file lacks, resuming wherever a transfer breaks off.

    Raises:
        DataPrepError: it cannot be fetched.
    """
    furthest, in_vain = 0, 0
    while True:
        start = partial.stat().st_size if partial.exists() else 0
        try:
            _append(session, address, partial, start)
            return
        except HTTPError as error:
            reached = partial.stat().st_size
            in_vain = 0 if reached > max(furthest, start) else in_vain + 1
            furthest = max(furthest, reached)
            broken_off = f"the transfer broke off ({_root_cause(error)}) after {reached:,} bytes"
            if in_vain == ATTEMPTS:
                raise DataPrepError(
                    f"{address} could not be fetched: {broken_off}, and {ATTEMPTS} attempts "
                    f"brought no more. {_ELSEWHERE}"
                ) from error
            log.info("%s: %s", address, broken_off)
        time.sleep(PAUSE_SECONDS * 2**in_vain)


def _append(session: requests.Session, address: str, partial: Path, start: int) -> None:
    """Ask once for what follows the first `start` bytes, and append it.

    Raises:
        HTTPError: not all of it came.
        DataPrepError: there is no usable answer.
    """
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        response = session.get(address, headers=headers, stream=True, timeout=TIMEOUTS_SECONDS)
    except requests.RequestException as error:
        raise DataPrepError(
            f"{address} could not be fetched: {_root_cause(error)}. {_ELSEWHERE}"
        ) from error
    with response:
        status = response.status_code
        if start and status == 416:  # nothing follows; the digest tells whether it is the file
            return
        if status not in (200, 206):
            raise DataPrepError(
                f"{address} could not be fetched: the server answered {status} {response.reason}. "
                f"{_ELSEWHERE}"
            )
        start = start if status == 206 else 0
        log.info("%s: fetching from byte %s", address, f"{start:,}")
        rest = response.raw.length_remaining
        total = None if rest is None else start + rest
        with (
            partial.open("ab" if start else "wb") as out,
            tqdm(
                initial=start,
                total=total,
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


def _root_cause(error: BaseException) -> BaseException:
    """The refused connection, say, that urllib3 and requests wrap several times."""
    while error.__context__ is not None:
        error = error.__context__
    return error
