"""Downloads from a server on loopback that misbehaves, and archives that are damaged or hostile."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import random
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import nearly_full_disk
from dataprep import DataPrepError, archives, downloads
from dataprep.archives import MAX_HEADERS_BYTES, unpack
from dataprep.checksums import check_file, file_digest, file_sha256, scratch_folder
from dataprep.downloads import ATTEMPTS, SourceFile, obtain_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DATA_PREP = Path(__file__).resolve().parent.parent / "data-prep"
CONTENT = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(250_000)
NAME = "corpus.tgz"
LOST = downloads._CHUNK_BYTES  # at most, of what was sent before a transfer broke off


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- downloads


@dataclass
class Quirks:
    """How a server answers one request; by default it does everything right.

    Attributes:
        status: another status, with an error page.
        headers: put in, or in the place of what it would say; None leaves a header out.
        ranges: whether it heeds Range.
        if_range: whether it heeds If-Range.
        stop_after: closes the connection after so many bytes of the body.
        stall: waits for this before it closes the connection.
    """

    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    ranges: bool = True
    if_range: bool = True
    stop_after: int | None = None
    stall: threading.Event | None = None


@dataclass
class Request:
    """What was asked for, and how much of the file was sent."""

    path: str
    headers: dict[str, str]
    sent: int = 0

    @property
    def start(self) -> int | None:
        """Where the rest begins that was asked for; None if all was."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else None


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under every path.

    Attributes:
        script: the quirks of the next answers, one each.
        always: the quirks of all after them.
        requests: what was asked for so far.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.modified = "Wed, 01 Jan 2025 00:00:00 GMT"
        self.script: list[Quirks] = []
        self.always = Quirks()
        self.requests: list[Request] = []

    @property
    def mirror(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data"

    @property
    def address(self) -> str:
        return f"{self.mirror}/{NAME}"

    @property
    def pin(self) -> SourceFile:
        """The pin of what is served now."""
        return SourceFile(self.address, f"sha256:{sha256(self.content)}")

    @property
    def starts(self) -> list[int | None]:
        return [request.start for request in self.requests]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        request = Request(self.path, dict(self.headers))
        self.server.requests.append(request)
        quirks = self.server.script.pop(0) if self.server.script else self.server.always
        status, body, headers = self.answer(self.server.content, request, quirks)
        self.send_response(status)
        headers |= {"Content-Length": str(len(body))} | quirks.headers
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for i in range(0, len(body), 10_000):
                piece = body[: quirks.stop_after][i : i + 10_000]
                self.wfile.write(piece)
                request.sent += len(piece)
        if quirks.stall is not None:
            quirks.stall.wait(20)

    def answer(
        self, content: bytes, request: Request, quirks: Quirks
    ) -> tuple[int, bytes, dict[str, str]]:
        tag = f'"{sha256(content)}"'
        headers = {"ETag": tag, "Last-Modified": self.server.modified}
        unchanged = request.headers.get("If-Range") in (tag, self.server.modified)
        if quirks.status is not None:
            return quirks.status, b"<html>sorry</html>", headers
        if request.start is None or not quirks.ranges or (quirks.if_range and not unchanged):
            return 200, content, headers
        if request.start >= len(content):
            return 416, b"no such part", {"Content-Range": f"bytes */{len(content)}"}
        served = f"bytes {request.start}-{len(content) - 1}/{len(content)}"
        return 206, content[request.start :], {**headers, "Content-Range": served}

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fetch(file: SourceFile, cache: Path, mirror: str | None = None) -> bytes:
    """Obtain one file that must come out whole and alone; returns its content."""
    paths = obtain_files([file], cache, mirror)
    assert paths == {NAME: cache / NAME}
    left = [NAME] if file.digest else [NAME, f"{NAME}.sha256"]
    assert names(cache) == left
    return paths[NAME].read_bytes()


def failure(file: SourceFile, cache: Path, mirror: str | None = None) -> str:
    """Obtain a file that cannot be had; returns the sentence."""
    with pytest.raises(DataPrepError) as caught:
        obtain_files([file], cache, mirror)
    assert not (cache / NAME).exists()
    return str(caught.value)


def leave_partial(server: Server, cache: Path, file: SourceFile | None = None) -> int:
    """Let a run fail after two thirds of the file; returns how much of it is kept."""
    server.script = [Quirks(stop_after=200_000), Quirks(status=404)]
    failure(file or server.pin, cache)
    server.requests.clear()
    size = (cache / f".partial-{NAME}").stat().st_size
    assert 200_000 - LOST <= size <= 200_000
    return size


@pytest.mark.parametrize(
    "digest",
    [
        f"sha256:{sha256(CONTENT)}",
        f"sha256:{sha256(CONTENT).upper()}",
        f"md5:{hashlib.md5(CONTENT).hexdigest()}",
    ],
    ids=["sha256", "capitals", "md5"],
)
def test_a_file_is_fetched_once(server, cache, digest, caplog, capsys):
    caplog.set_level("INFO")
    file = SourceFile(server.address, digest, len(CONTENT))
    assert fetch(file, cache) == CONTENT
    (request,) = server.requests
    assert request.path == f"/data/{NAME}"
    assert request.headers["Accept-Encoding"] == "identity"
    assert "Range" not in request.headers
    assert f"file {NAME}: fetched from {server.address}" in caplog.messages
    assert fetch(file, cache) == CONTENT
    assert len(server.requests) == 1
    assert caplog.messages[-1] == f"file {NAME}: already here"
    assert capsys.readouterr().err == ""  # no progress bar where nobody watches


def test_a_mirror_stands_in_for_the_published_address(server, cache):
    file = SourceFile(f"https://nowhere.invalid/far/{NAME}", f"sha256:{sha256(CONTENT)}")
    assert fetch(file, cache, f"{server.mirror}/") == CONTENT
    assert [request.path for request in server.requests] == [f"/data/{NAME}"]


def test_a_transfer_that_breaks_off_goes_on_with_the_rest(server, cache, caplog):
    caplog.set_level("INFO")
    server.script = [Quirks(stop_after=100_000), Quirks(stop_after=100_000)]
    assert fetch(server.pin, cache) == CONTENT
    first, second = server.starts[1:]
    assert server.starts[0] is None
    assert 100_000 - LOST <= first <= 100_000
    assert first + 100_000 - LOST <= second <= first + 100_000
    assert server.requests[1].headers["If-Range"] == f'"{sha256(CONTENT)}"'
    assert sum(request.sent for request in server.requests) == 200_000 + 300_000 - second
    assert sum("the transfer broke off" in message for message in caplog.messages) == 2


def test_another_run_goes_on_with_the_rest(server, cache):
    kept = leave_partial(server, cache)
    assert fetch(server.pin, cache) == CONTENT
    assert [(request.start, request.sent) for request in server.requests] == [
        (kept, 300_000 - kept)
    ]


def test_what_a_killed_process_fetched_is_kept(server, cache):
    stall = threading.Event()
    server.script = [Quirks(stop_after=150_000, stall=stall)]
    code = (
        f"import sys; sys.path.insert(0, {str(DATA_PREP)!r})\n"
        "from pathlib import Path\n"
        "from dataprep.downloads import SourceFile, obtain_files\n"
        "obtain_files([SourceFile(sys.argv[1], sys.argv[2])], Path(sys.argv[3]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.address, server.pin.digest, str(cache)]
    )
    partial = cache / f".partial-{NAME}"
    try:
        wait_until(lambda: partial.exists() and partial.stat().st_size >= 150_000 - LOST)
    finally:
        process.kill()
        process.wait()
        stall.set()
    assert NAME not in names(cache)
    kept = partial.stat().st_size
    assert fetch(server.pin, cache) == CONTENT
    assert server.starts == [None, kept]
    assert server.requests[1].sent == 300_000 - kept


def test_a_file_that_arrived_whole_is_not_sent_again(server, cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "check_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            obtain_files([server.pin], cache)
    assert fetch(server.pin, cache) == CONTENT
    assert [request.start for request in server.requests] == [None, 300_000]
    assert server.requests[1].sent == len(b"no such part")


def test_a_partial_file_that_is_too_long(server, cache):
    unpinned = SourceFile(server.address)
    leave_partial(server, cache, unpinned)
    with (cache / f".partial-{NAME}").open("ab") as partial:
        partial.write(bytes(200_000))
    assert fetch(unpinned, cache) == CONTENT
    assert server.starts[-1] is None


def test_a_server_that_ignores_ranges(server, cache):
    server.always = Quirks(ranges=False)
    leave_partial(server, cache)
    server.script = [Quirks(ranges=False, stop_after=100_000)]
    assert fetch(server.pin, cache) == CONTENT
    assert [request.sent for request in server.requests] == [100_000, 300_000]


def test_attempts_that_bring_nothing_new_come_to_an_end(server, cache):
    server.always = Quirks(ranges=False, stop_after=100_000)
    message = failure(server.pin, cache)
    assert len(server.requests) == ATTEMPTS + 1
    assert re.search(
        rf"{server.address} could not be fetched: the transfer broke off \(.*\), and {ATTEMPTS} "
        r"attempts brought no more than \d+,\d+ bytes\. Check the network, or .* with --mirror\.",
        message,
    )
    assert names(cache) == [f".partial-{NAME}", f".partial-{NAME}.origin"]


@pytest.mark.parametrize("heeded", [True, False], ids=["If-Range heeded", "If-Range ignored"])
@pytest.mark.parametrize("digest", ["sha256", None])
def test_a_file_that_changed_meanwhile_is_fetched_whole(server, cache, heeded, digest):
    leave_partial(server, cache, SourceFile(server.address, digest and server.pin.digest))
    server.content = OTHER
    server.always = Quirks(if_range=heeded)
    assert fetch(SourceFile(server.address, digest and server.pin.digest), cache) == OTHER
    assert server.requests[-1].sent == len(OTHER)


def test_another_part_than_was_asked_for(server, cache):
    leave_partial(server, cache)
    server.script = [Quirks(headers={"Content-Range": "bytes 5-299999/300000"})]
    assert fetch(server.pin, cache) == CONTENT
    assert server.starts[1:] == [None]
    wrong = {"Content-Range": "bytes 5-299999/300000"}
    server.always = Quirks(status=206, headers=wrong)
    (cache / NAME).unlink()
    assert "the server sent another part than was asked for" in failure(server.pin, cache)
    assert names(cache) == []


def test_a_part_that_is_no_part_of_the_whole(server, cache):
    kept = leave_partial(server, cache)
    server.script = [Quirks(headers={"Content-Range": f"bytes {kept}-210000/210001"})]
    message = failure(server.pin, cache)
    assert "bytes and should have 210,001" in message
    assert names(cache) == []


def test_versions_are_told_apart_by_a_time_where_the_tag_is_weak(server, cache):
    server.always = Quirks(headers={"ETag": 'W/"1"'})
    server.script = [Quirks(headers={"ETag": 'W/"1"'}, stop_after=100_000)]
    assert fetch(server.pin, cache) == CONTENT
    assert server.requests[1].headers["If-Range"] == server.modified
    assert server.requests[1].start > 0


def test_versions_that_cannot_be_told_apart_are_not_pieced_together(server, cache):
    bare = {"ETag": None, "Last-Modified": None}
    server.always = Quirks(headers=bare)
    server.script = [Quirks(headers=bare, stop_after=100_000)]
    assert fetch(server.pin, cache) == CONTENT
    assert server.starts == [None, None]


def test_what_came_from_another_address_is_not_gone_on_with(server, cache):
    leave_partial(server, cache)
    assert fetch(server.pin, cache, f"{server.mirror}/elsewhere") == CONTENT
    assert server.starts == [None]


@pytest.mark.parametrize("status", [403, 404, 410])
def test_an_answer_that_will_not_change_is_taken_at_once(server, cache, status):
    server.always = Quirks(status=status)
    reason = http.HTTPStatus(status).phrase
    message = failure(server.pin, cache)
    assert f"{server.address} could not be fetched: the server answered {status} {reason}. " in (
        message
    )
    assert "--mirror" in message
    assert len(server.requests) == 1
    assert names(cache) == []


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(server, cache, status, monkeypatch):
    monkeypatch.setattr(downloads, "LONGEST_PAUSE_SECONDS", 0.01)
    busy = Quirks(status=status, headers={"Retry-After": "3600"})
    server.script = [busy, busy]
    assert fetch(server.pin, cache) == CONTENT
    assert len(server.requests) == 3
    (cache / NAME).unlink()
    server.requests.clear()
    server.always = busy
    assert f"the server answered {status} " in failure(server.pin, cache)
    assert len(server.requests) == ATTEMPTS


def test_a_server_that_falls_silent(server, cache, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(downloads, "TIMEOUTS_SECONDS", (5, 0.2))
    stall = threading.Event()
    server.script = [Quirks(stop_after=100_000, stall=stall)]
    assert fetch(server.pin, cache) == CONTENT
    stall.set()
    assert any("the transfer broke off (timed out)" in message for message in caplog.messages)
    assert server.starts[1] >= 100_000 - LOST


def test_redirects_are_followed_with_the_range(server, cache):
    kept = leave_partial(server, cache)
    server.script = [Quirks(status=302, headers={"Location": "/moved/there"})]
    assert fetch(server.pin, cache) == CONTENT
    assert [(request.path, request.start) for request in server.requests] == [
        (f"/data/{NAME}", kept),
        ("/moved/there", kept),
    ]
    server.always = Quirks(status=302, headers={"Location": "/moved/there"})
    (cache / NAME).unlink()
    assert "could not be fetched: Exceeded 30 redirects" in failure(server.pin, cache)


def test_no_server(server, cache):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{taken.getsockname()[1]}"
        message = failure(server.pin, cache, mirror)
    assert re.search(
        rf"{mirror}/{NAME} could not be fetched: .*Connection refused\. Check the network", message
    )
    assert "No connection adapters" in failure(server.pin, cache, "other://place")
    assert names(cache) == []


def test_what_was_fetched_before_another_file_failed_is_kept(server, cache):
    files = [SourceFile(f"{server.mirror}/{i}", server.pin.digest) for i in range(3)]
    server.script = [Quirks(), Quirks(status=404)]
    with pytest.raises(DataPrepError, match=f"{files[1].address} could not be fetched"):
        obtain_files(files, cache)
    assert names(cache) == ["0"]
    server.requests.clear()
    assert obtain_files(files, cache) == {str(i): cache / str(i) for i in range(3)}
    assert [request.path for request in server.requests] == ["/data/1", "/data/2"]


def test_another_file_than_the_pinned_one(server, cache):
    file = SourceFile(server.address, f"md5:{hashlib.md5(OTHER).hexdigest()}")
    message = failure(file, cache)
    assert message.startswith(
        f"{server.address} is not the file that was pinned: expected MD5 "
        f"{hashlib.md5(OTHER).hexdigest()}, found {hashlib.md5(CONTENT).hexdigest()} (300,000 "
        "bytes). "
    )
    assert len(server.requests) == 1
    assert names(cache) == []


def test_pieces_that_do_not_fit_are_fetched_anew_once(server, cache):
    leave_partial(server, cache)
    with (cache / f".partial-{NAME}").open("r+b") as partial:
        partial.write(b"rotten")
    assert fetch(server.pin, cache) == CONTENT
    assert server.starts[1:] == [None]

    (cache / NAME).unlink()
    leave_partial(server, cache)
    wrong = SourceFile(server.address, f"sha256:{sha256(OTHER)}")
    server.script = [Quirks(), Quirks(stop_after=100_000)]
    assert f"found {sha256(CONTENT)}" in failure(wrong, cache)
    assert [start is None for start in server.starts] == [False, True, False]
    assert names(cache) == []


def test_a_file_in_the_cache_that_rotted(server, cache):
    fetch(server.pin, cache)
    (cache / NAME).write_bytes(b"rotten")
    with pytest.raises(DataPrepError, match="Delete it and run the same command again"):
        obtain_files([server.pin], cache)


def test_a_full_disk(server, cache):
    with nearly_full_disk(100_000):
        message = failure(server.pin, cache)
    assert message.startswith(
        f"{NAME} does not fit into {cache} (File too large): 200,000 more bytes are needed after "
        "the first 100,000. Make room, or name another folder with --cache; what is there is kept"
    )
    server.requests.clear()
    assert fetch(server.pin, cache) == CONTENT
    assert server.starts == [100_000]


def test_a_disk_that_takes_less_than_it_is_given(tmp_path):
    class Reluctant(io.FileIO):
        def write(self, data: memoryview) -> int:
            return super().write(data[:7])

    with Reluctant(tmp_path / NAME, "ab") as stream:
        downloads._Partial(tmp_path / NAME, stream).append(CONTENT[:100])
    assert (tmp_path / NAME).read_bytes() == CONTENT[:100]


def test_a_cache_that_cannot_be_written(server, cache, monkeypatch):
    cache.write_text("a file")
    assert f"{cache / NAME} cannot be written (File exists)" in failure(server.pin, cache)
    cache.unlink()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads.os, "fsync", full)
    assert "cannot be written (No space left on device)" in failure(server.pin, cache)


def test_more_or_less_than_the_known_size(server, cache):
    kept = leave_partial(server, cache)
    for size in (299_999, 300_001):
        file = SourceFile(server.address, server.pin.digest, size)
        assert f"{server.address} has 300,000 bytes and should have {size:,}. " in (
            failure(file, cache)
        )
    # What some networks put in the place of every page does not cost what is there.
    server.content = b"<html>Welcome to the hotel</html>"
    assert "has 33 bytes and should have 300,000" in (
        failure(SourceFile(server.address, None, 300_000), cache)
    )
    assert (cache / f".partial-{NAME}").stat().st_size == kept


def test_more_or_less_than_the_known_size_without_a_length(server, cache):
    unsaid = {"Content-Length": None}
    server.always = Quirks(headers=unsaid)
    file = SourceFile(server.address, server.pin.digest, 100_000)
    message = failure(file, cache)
    found = int(
        re.search(r"has ([\d,]+) bytes and should have 100,000", message)[1].replace(",", "")
    )
    assert 100_000 < found <= 100_000 + LOST
    assert names(cache) == []
    server.script = [Quirks(headers=unsaid, stop_after=200_000)]
    assert fetch(SourceFile(server.address, server.pin.digest, 300_000), cache) == CONTENT
    assert server.starts[-1] == 200_000


def test_nobody_knows_the_size(server, cache):
    server.always = Quirks(headers={"Content-Length": None})
    assert fetch(server.pin, cache) == CONTENT


def test_what_a_server_calls_encoded_is_kept_as_it_is(server, cache):
    server.content = gzip.compress(CONTENT)
    server.always = Quirks(headers={"Content-Encoding": "x-gzip"})
    assert fetch(server.pin, cache) == server.content


def test_a_file_without_a_pin_is_held_to_what_it_was_first(server, cache, caplog):
    caplog.set_level("INFO")
    file = SourceFile(server.address, size=300_000)
    assert fetch(file, cache) == CONTENT
    record = cache / f"{NAME}.sha256"
    assert record.read_text() == f"{sha256(CONTENT)}  {NAME}\n"
    assert f"file {NAME}: not pinned, SHA-256 {sha256(CONTENT)} kept in {record}" in caplog.messages
    assert fetch(file, cache) == CONTENT
    assert len(server.requests) == 1

    (cache / NAME).write_bytes(b"rotten")
    with pytest.raises(DataPrepError) as caught:
        obtain_files([file], cache)
    assert f"expected SHA-256 {sha256(CONTENT)}, found {sha256(b'rotten')}" in str(caught.value)
    assert f"delete {record}" in str(caught.value)

    (cache / NAME).unlink()
    server.content = OTHER
    unsized = SourceFile(server.address)
    assert f"expected SHA-256 {sha256(CONTENT)}" in failure(unsized, cache)
    assert names(cache) == [record.name]
    record.write_text("nonsense\n")
    assert f"{record} does not begin with a SHA-256. Delete it" in failure(unsized, cache)
    record.unlink()
    assert fetch(unsized, cache) == OTHER


def test_files_of_a_folder_are_read_where_they_are(server, cache, tmp_path):
    folder = tmp_path / "mirror"
    folder.mkdir()
    message = failure(server.pin, cache, str(folder))
    assert f"{folder / NAME} cannot be read (No such file or directory)" in message
    assert f"Put {NAME} as published at {server.address} into that folder" in message
    (folder / NAME).write_bytes(CONTENT)
    assert obtain_files([server.pin], cache, str(folder)) == {NAME: folder / NAME}
    assert not cache.exists()

    unpinned = SourceFile(server.address)
    assert "has 300,000 bytes and should have 7" in (
        failure(SourceFile(server.address, size=7), cache, str(folder))
    )
    assert obtain_files([unpinned], cache, str(folder)) == {NAME: folder / NAME}
    assert names(folder) == [NAME]
    assert names(cache) == [f"{NAME}.sha256"]
    (folder / NAME).write_bytes(OTHER)
    assert f"{folder / NAME} is not the file" in failure(unpinned, cache, str(folder))
    (folder / NAME).unlink()
    assert "cannot be read (No such file" in failure(unpinned, cache, str(folder))
    (cache / f"{NAME}.sha256").unlink()
    assert "cannot be read (No such file" in failure(unpinned, cache, str(folder))
    assert server.requests == []


@pytest.mark.parametrize(
    ("first", "starts"),
    [
        ("finishes", [True, False]),
        ("fails", [True, False, False]),
        ("deletes", [True, False, True, True]),
    ],
)
def test_two_at_a_time_do_not_get_in_each_others_way(server, cache, caplog, first, starts):
    """The second goes on from what the first has done, whatever that comes to."""
    caplog.set_level("INFO")
    stall = threading.Event()
    server.script = [Quirks(stop_after=100_000, stall=stall)]
    server.script += [Quirks(status=404)] if first == "fails" else []
    wrong = SourceFile(server.address, f"sha256:{sha256(OTHER)}")
    partial = cache / f".partial-{NAME}"
    with ThreadPoolExecutor() as pool:
        one = pool.submit(obtain_files, [wrong if first == "deletes" else server.pin], cache)
        wait_until(lambda: partial.exists() and partial.stat().st_size >= 100_000 - LOST)
        two = pool.submit(obtain_files, [server.pin], cache)
        wait_until(lambda: any("waiting for it" in message for message in caplog.messages))
        stall.set()
        assert two.result() == {NAME: cache / NAME}
        assert (one.exception() is None) == (first == "finishes")
    assert names(cache) == [NAME]
    assert file_sha256(cache / NAME) == sha256(CONTENT)
    assert [start is None for start in server.starts] == starts


# ---- checksums


def test_digests(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    assert file_digest(path, "md5") == hashlib.md5(CONTENT).hexdigest()
    (tmp_path / "greeting").write_bytes(b"hello\n")  # what git hash-object prints for it:
    named = "ce013625030ba8dba906f756967f9e9ca394464a"
    assert file_digest(tmp_path / "greeting", "git-sha1") == named
    with pytest.raises(DataPrepError, match=f"expected SHA-1 of git 00, found {named} "):
        check_file(tmp_path / "greeting", "git-sha1:00", "")
    check_file(path, sha256(CONTENT), "")  # bare
    check_file(path, f"sha256:{sha256(CONTENT)}", "")
    with pytest.raises(DataPrepError, match=r"^this is not .*: expected SHA-256 00, .* Mend it\.$"):
        check_file(path, "00", "Mend it.", called="this")
    with pytest.raises(DataPrepError, match=r"cannot be read \(Is a directory\)\. Mend it\.$"):
        check_file(tmp_path, sha256(CONTENT), "Mend it.")


def test_scratch_folders_of_killed_runs_go_and_partial_downloads_stay(tmp_path):
    (tmp_path / ".partial-killed").mkdir()
    (tmp_path / ".partial-killed/file").write_bytes(CONTENT)
    (tmp_path / ".partial-download").write_bytes(CONTENT)
    with scratch_folder(tmp_path) as scratch:
        assert names(tmp_path) == sorted([scratch.name, ".partial-download"])
    assert names(tmp_path) == [".partial-download"]


# ---- archives

Member = tuple[tarfile.TarInfo, bytes]
WANTED = {"de-en/train.de": b"Ein Satz.\n" * 500, "train.en": b"A sentence.\n" * 500}


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: object) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for attribute, value in more.items():
        setattr(info, attribute, value)
    return info, data


def tar(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    """The bytes of an archive; what the headers say need not be true."""
    blocks = []
    for info, data in members:
        blocks += [info.tobuf(form), data, bytes(-len(data) % 512)]
    return b"".join([*blocks, bytes(1024)])


def wanted_members(prefix: str = "") -> list[Member]:
    return [member(f"{prefix}{name}", data) for name, data in WANTED.items()]


@pytest.fixture
def targets(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    return dict(zip(WANTED, (tmp_path / "a/source", tmp_path / "b/target"), strict=True))


@pytest.fixture
def refused(tmp_path: Path, targets: dict[str, Path]) -> Callable[..., str]:
    """Unpacks what must not be unpacked, and leaves nothing; returns the sentence."""

    def run(content: bytes, **options: int) -> str:
        archive = tmp_path / NAME
        archive.write_bytes(content)
        with pytest.raises(DataPrepError) as caught:
            unpack(archive, targets, **options)
        assert names(tmp_path) == ["a", "b", NAME]
        assert names(tmp_path / "a") == names(tmp_path / "b") == []
        assert str(archive) in str(caught.value)
        return str(caught.value)

    return run


@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tgz"])
def test_wanted_members_are_written_and_nothing_else(tmp_path, targets, prefix, pack):
    unwanted = [
        member("de-en", kind=tarfile.DIRTYPE),
        member("README", b"text"),
        member("etc", kind=tarfile.SYMTYPE, linkname="/etc"),
        member("link", kind=tarfile.LNKTYPE, linkname="../../passwd"),
        member("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("pipe", kind=tarfile.FIFOTYPE),
        member("x" * 300, b"text"),
        member(".../..x/x..", b"text"),
    ]
    archive = tmp_path / "corpus"
    archive.write_bytes(pack(tar(*unwanted, *wanted_members(prefix), *unwanted)))
    unpack(archive, targets)
    assert [path.read_bytes() for path in targets.values()] == list(WANTED.values())
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {"corpus", "a", "a/source", "b", "b/target"}
    assert not targets["train.en"].stat().st_mode & 0o111


@pytest.mark.parametrize(
    "name", ["/etc/passwd", ".//etc/passwd", "../up", "a/../../up", "a/..", "/" + "x" * 200]
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_names_that_lead_elsewhere(refused, name, kind):
    message = refused(gzip.compress(tar(*wanted_members(), member(name, kind=kind))))
    assert "in it would lie outside of it. Delete it and fetch it from a place that" in message


@pytest.mark.parametrize(
    "kind",
    [
        *(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE),
        *(tarfile.BLKTYPE, b"?"),
    ],
)
def test_wanted_members_that_are_no_files(refused, kind):
    source, _ = wanted_members()
    odd = member("train.en", kind=kind, linkname="de-en/train.de")
    assert "'train.en' in it is not a file" in refused(tar(source, odd))


def test_wanted_members_that_occur_twice(refused):
    again = member("./train.en", b"other text")
    assert "it holds 'train.en' twice" in refused(tar(*wanted_members(), again))
    link = member("train.en", kind=tarfile.SYMTYPE, linkname="/etc/passwd")
    assert "it holds 'train.en' twice" in refused(tar(*wanted_members(), link))


def test_wanted_members_that_are_missing(refused):
    others = [member(f"other{i}") for i in range(9)]
    message = refused(tar(member("\x1b[31mred\u202e"), *others, wanted_members()[0]))
    assert "does not hold train.en: it is not the archive that was expected. Among its 11" in (
        message
    )
    assert r"'\x1b[31mred\u202e', 'other0'" in message
    assert "other4" not in message
    assert "Among its 0 members are nothing" in refused(tar())


def test_more_than_may_come_out(refused):
    small = gzip.compress(tar(*wanted_members(), member("zeros", bytes(5_000_000))))
    assert "refused: it unpacks to more than 1,000,000 bytes" in refused(small, max_bytes=1_000_000)
    whole = len(tar(*wanted_members()))
    assert "more than" in refused(tar(*wanted_members()), max_bytes=whole - 1)


@pytest.mark.parametrize("name", ["unwanted", "de-en/train.de"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"?"])
def test_a_declared_size_is_enough_to_be_refused(refused, name, kind):
    """What will be too large is not read at all, which for sizes like this would never end."""
    huge = member(name, kind=kind, size=2**80)
    assert "it unpacks to more than" in refused(tar(huge, form=tarfile.GNU_FORMAT))


def bare_header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def extended_sparse_header() -> bytes:
    """A header that says that it goes on, but does not."""
    header = bytearray(bare_header(tarfile.GNUTYPE_SPARSE, 0))
    header[482] = 1
    return sealed(header)


def half_compressed(content: bytes) -> bytes:
    """A gzip file that cannot be decompressed from the middle on."""
    compressor = zlib.compressobj(wbits=31)
    first = compressor.compress(content[: len(content) // 2])
    return first + compressor.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 100


def sealed(header: bytearray) -> bytes:
    """A header with its sum put right."""
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    return bytes(header[:148]) + b"%06o\0 " % total + bytes(header[156:])


def zeros_as(kind: bytes) -> bytes:
    return bare_header(kind, 20_000_000) + bytes(20_000_000)


def global_headers() -> bytes:
    """Sixty thousand settings for all members to come."""
    records = [b"%d k%07d=v\n" % (14, i) for i in range(60_000)]
    texts = [b"".join(records[i : i + 4_000]) for i in range(0, len(records), 4_000)]
    one = tar(member("x"))[:512]
    return b"".join(
        bare_header(tarfile.XGLTYPE, len(text)) + text + bytes(-len(text) % 512) + one
        for text in texts
    )


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10"}
BOMBS: dict[str, Callable[[], bytes]] = {
    "pax header": lambda: zeros_as(tarfile.XHDTYPE),
    "global pax header": lambda: zeros_as(tarfile.XGLTYPE),
    "global pax headers": lambda: global_headers(),
    "long name": lambda: zeros_as(tarfile.GNUTYPE_LONGNAME),
    "folder with a size": lambda: zeros_as(tarfile.DIRTYPE),
    "sparse map": lambda: tar(member("x", b"9999999\n" + b"0\n" * 10**7, pax_headers=SPARSE)),
    "folders": lambda: bare_header(tarfile.DIRTYPE, 0) * 6_000 + tar(member("..")),
    "empty files": lambda: bare_header(tarfile.REGTYPE, 0) * 6_000 + tar(member("..")),
    "padding": lambda: tar(*wanted_members()) + bytes(20_000_000),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_headers_that_would_fill_the_memory(refused, kind, monkeypatch):
    monkeypatch.setattr(archives, "MAX_HEADERS_BYTES", 2 * 1024**2)
    bomb = gzip.compress(bare_header(tarfile.REGTYPE, 0) + BOMBS[kind](), 1)
    tracemalloc.start()
    try:
        message = refused(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_300_000
    if kind != "global pax headers":
        assert "refused: there is more between its files than headers need" in message


def test_ordinary_headers_are_not_too_many(tmp_path, targets):
    many = [member(f"corpus/{i:04}", kind=tarfile.DIRTYPE) for i in range(200)]
    many += [member(f"corpus/{i:04}.txt", b"x", mtime=1.5) for i in range(2_000)]
    padding = bytes(MAX_HEADERS_BYTES // 4)
    archive = tmp_path / NAME
    archive.write_bytes(gzip.compress(tar(*many, *wanted_members()) + padding, 1))
    unpack(archive, targets)


def test_sparse_files(refused):
    gnu = member("x", kind=tarfile.GNUTYPE_SPARSE)
    assert "'x' in it is a sparse file" in refused(tar(gnu, form=tarfile.GNU_FORMAT))
    pax = member("train.en", b"1\n0\n1\n".ljust(513, b"\0"), pax_headers=SPARSE)
    assert "'train.en' in it is a sparse file" in refused(tar(pax))


DAMAGED = {
    "empty": b"",
    "only magic": b"\x1f\x8b",
    "html": b"<html>not found</html>" * 100,
    "empty gzip": gzip.compress(b""),
    "no tar": gzip.compress(b"no tar file"),
    "short tar": tar(*wanted_members(), member("x", b"text" * 500))[:-3_000],
    "negative size": tar(member("x", size=-512), form=tarfile.GNU_FORMAT),
    "negative pax size": tar(member("x", pax_headers={"size": "-1024"})),
    "sparse map": tar(member("x", pax_headers={"GNU.sparse.map": "1,x"})),
    "extended": extended_sparse_header(),
    "nested": bare_header(tarfile.XHDTYPE, 0) * 100,
    "more after the end": gzip.compress(tar(*wanted_members())) + b"more",
    "rotten half": half_compressed(tar(member("train.en", bytes(200_000)))),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_archives(refused, content):
    assert re.search(r" is damaged \(.+\)\. Delete it and run the same", refused(content))


def test_archives_that_end_early_or_fail_their_checksum(refused):
    whole = gzip.compress(tar(*wanted_members()))
    for length in range(len(whole)):
        refused(whole[:length])
    for place in range(-8, -4):  # the checksum
        changed = bytearray(whole)
        changed[place] ^= 1
        assert "CRC check failed" in refused(bytes(changed))


def test_an_archive_that_cannot_be_read(tmp_path, targets):
    with pytest.raises(DataPrepError, match=r"cannot be read \(No such file or directory\)"):
        unpack(tmp_path / "nothing", targets)


def test_no_room_for_what_is_unpacked(tmp_path, targets):
    archive = tmp_path / NAME
    archive.write_bytes(gzip.compress(tar(*wanted_members())))
    with nearly_full_disk(5_500), pytest.raises(DataPrepError) as caught:
        unpack(archive, targets)
    assert "cannot be written (File too large): 6,000 bytes are needed there" in str(caught.value)
    assert names(tmp_path / "a") == names(tmp_path / "b") == []


def test_a_refused_archive_leaves_what_was_there(tmp_path, targets):
    archive = tmp_path / NAME
    archive.write_bytes(gzip.compress(tar(*wanted_members()))[:-1])
    for path in targets.values():
        path.write_text("before")
    with pytest.raises(DataPrepError):
        unpack(archive, targets)
    assert [path.read_text() for path in targets.values()] == ["before", "before"]


Changes = Sequence[tuple[int, int]]
CHANGES = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4)
FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LONG_NAME = member("long" * 40, b"text")


def changed(content: bytes, changes: Changes, within: int | None = None) -> bytearray:
    """Some bytes replaced, of the first ones if `within` is given."""
    found = bytearray(content)
    for place, value in changes:
        found[place % (within or len(found))] = value
    return found


@FUZZ
@given(changes=CHANGES, cut=st.integers(0, 40))
def test_changed_bytes_of_a_compressed_archive_never_go_unnoticed(tmp_path, targets, changes, cut):
    whole = gzip.compress(tar(LONG_NAME, *wanted_members()))
    archive = tmp_path / NAME
    archive.write_bytes(changed(whole, changes)[: len(whole) - max(0, cut - 20)])
    try:
        unpack(archive, targets)
    except DataPrepError:
        assert names(tmp_path / "a") == names(tmp_path / "b") == []
    else:
        assert [path.read_bytes() for path in targets.values()] == list(WANTED.values())
        for path in targets.values():
            path.unlink()


@FUZZ
@given(changes=CHANGES)
def test_whatever_headers_say_only_the_wanted_files_appear(tmp_path, targets, changes):
    """The sums of the headers are put right, so that what was changed is read."""
    content = changed(tar(LONG_NAME, *wanted_members()), changes, within=2_048)
    for start in range(0, 2_048, 512):
        content[start : start + 512] = sealed(content[start : start + 512])
    archive = tmp_path / NAME
    archive.write_bytes(content)
    with contextlib.suppress(DataPrepError):
        unpack(archive, targets)
    assert names(tmp_path) == ["a", "b", NAME]
    assert set(names(tmp_path / "a") + names(tmp_path / "b")) <= {"source", "target"}
    for path in targets.values():
        path.unlink(missing_ok=True)
