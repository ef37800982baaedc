"""Fetches published files by their address and checks every byte before anybody reads them.

A file grows in the cache as `.partial-NAME`, and gets its name once it is whole and checked. What
arrived before an interruption stays there: the next attempt, or the next run, asks for the rest.
"""

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from dataprep import DataPrepError
from dataprep.checksums import REFETCH, check_file, read_digest

log = logging.getLogger(__name__)

ATTEMPTS = 5  # so many in a row that bring nothing new are enough
PAUSE_SECONDS = 1.0  # before the second attempt; doubled before each one after it
TIMEOUTS_SECONDS = (15.0, 60.0)  # to connect; between two pieces of an answer
LONGEST_PAUSE_SECONDS = 60.0  # whatever the server asks for

_CHUNK_BYTES = 16 * 1024  # what may be lost when a transfer breaks off
_ELSEWHERE = "Check the network, or name an address or a folder that holds the file with --mirror."


@dataclass(frozen=True)
class SourceFile:
    """One published file.

    Attributes:
        address: where it is published. What follows the last slash is the file's name, also in a
            mirror.
        digest: "ALGORITHM:HEX", see `checksums.file_digest`. Without one the file is held to what
            it was when it was first used.
        size: how many bytes it has, if that is known.
    """

    address: str
    digest: str | None = None
    size: int | None = None

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
        cache: the folder that fetched files are kept in, and the SHA-256 of those without a pin.
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
            remedy = (
                f"Put {file.filename} as published at {file.address} into that folder, or leave "
                "--mirror out to fetch it."
            )
            _check(file, folder / file.filename, cache, remedy)
        return {file.filename: folder / file.filename for file in files}
    for file in files:
        path = cache / file.filename
        if path.exists():
            _check(file, path, cache, REFETCH)
            log.info("file %s: already here", file.filename)
        else:
            address = file.address if mirror is None else f"{mirror.rstrip('/')}/{file.filename}"
            log.info("file %s: asking for %s", file.filename, address)
            _download(address, file, cache)
            log.info("file %s: fetched from %s", file.filename, address)
    return {file.filename: cache / file.filename for file in files}


def _check(
    file: SourceFile, path: Path, cache: Path, remedy: str, called: str | None = None
) -> None:
    """Hold a file to its pin, or else to its record in the cache, which its first use makes.

    Args:
        file: the pin.
        path: what should be that file.
        cache: where the record is kept, as `NAME.sha256`.
        remedy: the sentence that tells the user what to do if it is another file.
        called: what the user knows the file by, if not by its path.

    Raises:
        DataPrepError: the file cannot be read, or is another one.
    """
    record = cache / f"{file.filename}.sha256"
    if file.digest is not None:
        check_file(path, file.digest, remedy, called)
    elif record.exists():
        remedy = f"{remedy} If it was meant to change, delete {record}, its sum of the first time."
        check_file(path, _recorded(record), remedy, called)
    else:
        digest = read_digest(path, "sha256", remedy)
        size = path.stat().st_size
        if file.size is not None and size != file.size:
            raise _wrong_size(called or path, size, file.size, remedy)
        _write_record(record, f"{digest}  {file.filename}\n")
        log.info("file %s: not pinned, SHA-256 %s kept in %s", file.filename, digest, record)


def _recorded(record: Path) -> str:
    """The SHA-256 in a file of the kind that sha256sum writes."""
    digest = record.read_text(encoding="utf-8", errors="replace")[:64]
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise DataPrepError(f"{record} does not begin with a SHA-256. Delete it to have it anew.")
    return digest


def _write_record(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _wrong_size(name: str | Path, found: int, expected: int, remedy: str) -> DataPrepError:
    return DataPrepError(f"{name} has {found:,} bytes and should have {expected:,}. {remedy}")


def _download(address: str, file: SourceFile, cache: Path) -> None:
    """Fetch a file into `cache`; it gets its final name only once it is whole and checked."""
    final = cache / file.filename
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _hold(cache / f".partial-{file.filename}") as partial, _session() as session:
            if final.exists():  # the process that was waited for has made it
                return
            _fetch_checked(session, address, file, partial)
            partial.finish(final)
    except OSError as error:
        raise DataPrepError(
            f"{final} cannot be written ({error.strerror}). Mend that, or name another folder "
            "with --cache."
        ) from error


class _Partial:
    """A file on its way; beside it, the mark by which the server knows the version that it is of.

    Attributes:
        path: the file.
        pieced: whether what stands in it came in more than one transfer.
    """

    def __init__(self, path: Path, stream: FileIO) -> None:
        """Take over what an earlier attempt left; `stream` is locked and open for appending."""
        self.path = path
        self.pieced = False
        self._stream = stream
        self._origin = path.with_name(f"{path.name}.origin")

    @property
    def length(self) -> int:
        """How many bytes have arrived."""
        return os.fstat(self._stream.fileno()).st_size

    def validator(self, address: str) -> str | None:
        """What the server of that address can tell the version by."""
        if not self._origin.exists():
            return None
        origin, _, validator = self._origin.read_text(encoding="utf-8").partition("\n")
        return validator if origin == address else None

    def begin(self, address: str, validator: str | None) -> None:
        """Drop what stands in it, for a whole version from an address."""
        self._stream.truncate(0)
        self.pieced = False
        if validator is None:
            self._origin.unlink(missing_ok=True)
        else:
            self._origin.write_text(f"{address}\n{validator}", encoding="utf-8")

    def append(self, chunk: bytes) -> None:
        """Add what has come."""
        rest = memoryview(chunk)
        while rest:  # a disk that is nearly full takes less than it is given
            rest = rest[self._stream.write(rest) :]

    def finish(self, final: Path) -> None:
        """Give the whole file its name."""
        os.fsync(self._stream.fileno())
        os.replace(self.path, final)
        self._origin.unlink(missing_ok=True)

    def delete(self) -> None:
        """Leave nothing behind."""
        self.path.unlink(missing_ok=True)
        self._origin.unlink(missing_ok=True)


@contextmanager
def _hold(path: Path) -> Iterator[_Partial]:
    """Have a partial file for oneself, after a process that has it; an empty one is not kept."""
    while True:
        with path.open("ab", buffering=0) as stream:
            _lock(stream)
            if not _is_at(stream, path):  # the other process finished or deleted it meanwhile
                continue
            partial = _Partial(path, stream)
            try:
                yield partial
            finally:
                if not partial.length:
                    partial.delete()
            return


def _lock(stream: FileIO) -> None:
    """Lock a file until it is closed, by whatever ends the process too."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("another process is writing %s; waiting for it", stream.name)
        fcntl.flock(stream, fcntl.LOCK_EX)


def _is_at(stream: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


class _Retry(Retry):
    """Does not let a server put us off for hours."""

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        seconds = super().get_retry_after(response)
        return None if seconds is None else min(seconds, LONGEST_PAUSE_SECONDS)


def _session() -> requests.Session:
    """Knows how often to ask until there is an answer, and asks for files as they are stored."""
    session = requests.Session()
    retry = _Retry(
        total=ATTEMPTS - 1,
        backoff_factor=PAUSE_SECONDS,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    session.headers["Accept-Encoding"] = "identity"
    return session


class _BrokenOffError(Exception):
    """A transfer ended before the file was whole, and another may bring the rest."""


def _fetch_checked(
    session: requests.Session, address: str, file: SourceFile, partial: _Partial
) -> None:
    """Fetch a file and check it; one that was pieced together and is wrong is fetched once more.

    Raises:
        DataPrepError: it cannot be fetched, or is not the file that it should be.
    """
    remedy = "It was changed there or on the way; --mirror names another place to fetch it from."
    for repeatable in (True, False):
        _fetch(session, address, file, partial)
        try:
            _check(file, partial.path, partial.path.parent, remedy, called=address)
            return
        except DataPrepError:
            pieced = partial.pieced
            partial.begin(address, None)
            if not (pieced and repeatable):
                raise
        log.info("file %s: its pieces do not fit together, fetched anew", file.filename)


def _fetch(session: requests.Session, address: str, file: SourceFile, partial: _Partial) -> None:
    """Bring a partial file to its full length, going on where transfers broke off.

    Raises:
        DataPrepError: it cannot be fetched, or is not as long as it should be.
    """
    furthest, in_vain = partial.length, 0
    while True:
        try:
            _transfer(session, address, file, partial)
            return
        except _BrokenOffError as error:
            in_vain = 0 if partial.length > furthest else in_vain + 1
            furthest = max(furthest, partial.length)
            if in_vain == ATTEMPTS:
                raise DataPrepError(
                    f"{address} could not be fetched: {error}, and {ATTEMPTS} attempts brought no "
                    f"more than {furthest:,} bytes. {_ELSEWHERE}"
                ) from error
            log.info("file %s: %s after %s bytes", file.filename, error, f"{partial.length:,}")
        time.sleep(PAUSE_SECONDS * 2**in_vain)


def _transfer(session: requests.Session, address: str, file: SourceFile, partial: _Partial) -> None:
    """Ask once for what is missing, and append it.

    Raises:
        _BrokenOffError: not all of it came.
        DataPrepError: it cannot be fetched, or is not as long as it should be.
    """
    with _request(session, address, partial) as response:
        if _nothing_is_missing(response, partial):
            partial.pieced = True
            return
        total = _accept(response, address, file, partial)
        size = "unknown size" if total is None else f"{total:,} bytes"
        start = f"{partial.length:,}"
        log.info("file %s: fetching %s, %s, from byte %s", file.filename, address, size, start)
        try:
            for chunk in _chunks(response, file.filename, partial.length, total):
                partial.append(chunk)
                if total is not None and partial.length > total:
                    length = partial.length
                    partial.begin(address, None)
                    raise _wrong_size(address, length, total, _ELSEWHERE)
        except HTTPError as error:
            raise _BrokenOffError(f"the transfer broke off ({_root_cause(error)})") from error
        except OSError as error:
            raise _no_room(file, partial, total, error) from error
    if total is not None and partial.length < total:
        raise _BrokenOffError("the connection was closed")


def _request(session: requests.Session, address: str, partial: _Partial) -> requests.Response:
    """Ask for what a partial file lacks, or for everything if the versions cannot be told apart.

    Raises:
        DataPrepError: there is no usable answer.
    """
    headers = {}
    validator = partial.validator(address)
    if partial.length and validator:
        headers = {"Range": f"bytes={partial.length}-", "If-Range": validator}
    try:
        response = session.get(address, headers=headers, stream=True, timeout=TIMEOUTS_SECONDS)
    except requests.RequestException as error:
        raise DataPrepError(
            f"{address} could not be fetched: {_root_cause(error)}. {_ELSEWHERE}"
        ) from error
    if response.status_code not in (200, 206, 416):
        response.close()
        raise DataPrepError(
            f"{address} could not be fetched: the server answered {response.status_code} "
            f"{response.reason}. {_ELSEWHERE}"
        )
    return response


def _nothing_is_missing(response: requests.Response, partial: _Partial) -> bool:
    """Whether the server has no rest to send, as after a run that was killed while it checked."""
    end = f"bytes */{partial.length}"
    return response.status_code == 416 and response.headers.get("Content-Range") == end


def _accept(
    response: requests.Response, address: str, file: SourceFile, partial: _Partial
) -> int | None:
    """Make a partial file ready for what a server is about to send.

    Returns:
        How long the file will be when it is whole, if anybody knows.

    Raises:
        _BrokenOffError: it is not what was asked for.
        DataPrepError: the file will not be as long as it should be.
    """
    validator = _validator(response)
    if response.status_code == 200:
        total = _number(response.headers.get("Content-Length"))
    else:
        asked_for = re.compile(rf"bytes {partial.length}-\d+/(\d+|\*)")
        match = asked_for.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or validator not in (None, partial.validator(address)):
            partial.begin(address, None)
            raise _BrokenOffError("the server sent another part than was asked for")
        total = _number(match[1])
    if total is not None and file.size is not None and total != file.size:
        raise _wrong_size(address, total, file.size, _ELSEWHERE)
    if response.status_code == 200:
        partial.begin(address, validator)
    else:
        partial.pieced = True
    return total or file.size


def _validator(response: requests.Response) -> str | None:
    """What identifies a version byte for byte: a strong entity tag, or else a time."""
    tag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified") if tag.startswith("W/") else tag


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _chunks(
    response: requests.Response, name: str, start: int, total: int | None
) -> Iterator[bytes]:
    """What a server sends, with a progress bar where somebody may watch it."""
    with tqdm(
        initial=start, total=total, desc=name, unit="B", unit_scale=True, disable=None
    ) as bar:
        # Undecoded: some servers call a .tgz a tar file in gzip encoding.
        for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
            yield chunk
            bar.update(len(chunk))


def _no_room(
    file: SourceFile, partial: _Partial, total: int | None, error: OSError
) -> DataPrepError:
    """The sentence for a full disk, quota and the like."""
    needed = "more" if total is None else f"{total - partial.length:,} more bytes"
    return DataPrepError(
        f"{file.filename} does not fit into {partial.path.parent} ({error.strerror}): {needed} are "
        f"needed after the first {partial.length:,}. Make room, or name another folder with "
        "--cache; what is there is kept, and the same command goes on from it."
    )


def _root_cause(error: BaseException) -> BaseException:
    """The refused connection, say, that urllib3 and requests wrap several times."""
    while error.__context__ is not None:
        error = error.__context__
    return error
