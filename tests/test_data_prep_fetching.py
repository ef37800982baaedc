"""Downloads from a server on loopback that misbehaves; digests; archives."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import io
import random
import re
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import nearly_full_disk
from dataprep import DataPrepError, downloads
from dataprep.archives import unpack
from dataprep.checksums import check_file, file_digest, scratch_folder
from dataprep.downloads import ATTEMPTS, SourceFile, obtain_files
from loopback import serving

CONTENT = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(250_000)
NAME = "corpus.tgz"
LOST = downloads._CHUNK_BYTES  # at most, of what was sent before a transfer broke off


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- Downloads.


@dataclass
class Quirks:
    """How a server answers one request; by default it does everything right.

    Attributes:
        status: another status, with an error page.
        ranges: whether it heeds Range.
        stop_after: closes the connection after so many bytes of the body.
        stall: waits for this before it closes the connection.
    """

    status: int | None = None
    ranges: bool = True
    stop_after: int | None = None
    stall: threading.Event | None = None


@dataclass
class Request:
    """What was asked for: from which byte, or None if all of the file; how much of it was sent."""

    path: str
    start: int | None
    encoding: str
    sent: int = 0


@dataclass
class Server:
    """Serves `content` under every path.

    Attributes:
        script: the quirks of the next answers, one each.
        always: the quirks of all after them.
        requests: what was asked for so far.
    """

    mirror: str = ""
    content: bytes = CONTENT
    script: list[Quirks] = field(default_factory=list)
    always: Quirks = field(default_factory=Quirks)
    requests: list[Request] = field(default_factory=list)

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


def handler(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(match[1]) if match else None
            request = Request(self.path, start, self.headers["Accept-Encoding"])
            server.requests.append(request)
            quirks = server.script.pop(0) if server.script else server.always
            status, body = 200, server.content
            if quirks.status is not None:
                status, body = quirks.status, b"<html>sorry</html>"
            elif start is not None and quirks.ranges:
                body = server.content[start:]
                status = 206 if body else 416
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", "3600")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                body = body[: quirks.stop_after]
                for i in range(0, len(body), 10_000):
                    self.wfile.write(body[i : i + 10_000])
                    request.sent += len(body[i : i + 10_000])
            if quirks.stall is not None:
                quirks.stall.wait(60)

        def log_message(self, *_: object) -> None:
            """Nothing in the output of the tests."""

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = Server()
    with serving(handler(found)) as address:
        found.mirror = f"{address}/data"
        yield found


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def fetch(file: SourceFile, cache: Path, mirror: str | None = None) -> bytes:
    """Obtain one file that must come out whole and alone; returns its content."""
    paths = obtain_files([file], cache, mirror)
    assert paths == {NAME: cache / NAME}
    assert names(cache) == [NAME]
    return paths[NAME].read_bytes()


def failure(file: SourceFile, cache: Path, mirror: str | None = None) -> str:
    """Obtain a file that cannot be had; returns the message."""
    with pytest.raises(DataPrepError) as caught:
        obtain_files([file], cache, mirror)
    assert not (cache / NAME).exists()
    return str(caught.value)


def leave_partial(server: Server, cache: Path) -> int:
    """Let a run fail after two thirds of the file; returns how much of it is kept."""
    server.script = [Quirks(stop_after=200_000), Quirks(status=404)]
    failure(server.pin, cache)
    server.requests.clear()
    size = (cache / f".partial-{NAME}").stat().st_size
    assert 200_000 - LOST <= size <= 200_000
    return size


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_file_is_fetched_once(server, cache, algorithm, caplog, capsys):
    caplog.set_level("INFO")
    file = SourceFile(server.address, f"{algorithm}:{hashlib.new(algorithm, CONTENT).hexdigest()}")
    assert fetch(file, cache) == CONTENT
    (request,) = server.requests
    assert (request.path, request.start, request.encoding) == (f"/data/{NAME}", None, "identity")
    assert f"file {NAME}: fetched from {server.address}" in caplog.messages
    assert fetch(file, cache) == CONTENT
    assert len(server.requests) == 1
    assert caplog.messages[-1] == f"file {NAME}: already here"
    assert capsys.readouterr().err == ""  # no progress bar where nobody watches


def test_broken_transfer_is_resumed(server, cache, caplog):
    caplog.set_level("INFO")
    server.script = [Quirks(stop_after=100_000), Quirks(stop_after=100_000)]
    assert fetch(server.pin, cache) == CONTENT
    first, second = server.starts[1:]
    assert server.starts[0] is None
    assert 100_000 - LOST <= first <= 100_000
    assert first + 100_000 - LOST <= second <= first + 100_000
    assert server.requests[-1].sent == 300_000 - second
    assert sum("the transfer broke off" in message for message in caplog.messages) == 2


def test_next_run_resumes(server, cache):
    kept = leave_partial(server, cache)
    assert fetch(server.pin, cache) == CONTENT
    assert [(request.start, request.sent) for request in server.requests] == [
        (kept, 300_000 - kept)
    ]


def test_part_that_is_whole_is_not_sent_again(server, cache, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "check_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            obtain_files([server.pin], cache)
    assert fetch(server.pin, cache) == CONTENT
    assert server.starts == [None, 300_000]


@pytest.mark.parametrize("change", ["version", "damage", "length"])
def test_part_of_another_file_is_dropped(server, cache, change):
    leave_partial(server, cache)
    if change == "version":
        server.content = OTHER
    else:
        with (cache / f".partial-{NAME}").open("r+b" if change == "damage" else "ab") as partial:
            partial.write(bytes(200_000))
    assert fetch(server.pin, cache) == server.content
    assert server.starts[1:] == [None]


def test_server_that_ignores_ranges(server, cache):
    server.always = Quirks(ranges=False)
    leave_partial(server, cache)
    server.script = [Quirks(ranges=False, stop_after=100_000)]
    assert fetch(server.pin, cache) == CONTENT
    assert [request.sent for request in server.requests] == [100_000, 300_000]


def test_attempts_in_vain_end(server, cache):
    server.always = Quirks(ranges=False, stop_after=100_000)
    message = failure(server.pin, cache)
    assert len(server.requests) == ATTEMPTS + 1
    assert re.search(
        rf"{server.address} could not be fetched: the transfer broke off \(.*\) after \d+,\d+ "
        rf"bytes, and {ATTEMPTS} attempts brought no more\. Check the network, .* with --mirror\.",
        message,
    )
    assert names(cache) == [f".partial-{NAME}"]


def test_error_of_the_server_is_told_at_once(server, cache):
    server.always = Quirks(status=404)
    message = failure(server.pin, cache)
    assert "could not be fetched: the server answered 404 Not Found. Check the network" in message
    assert len(server.requests) == 1
    assert names(cache) == []


def test_busy_server_is_asked_again(server, cache):
    server.script = [Quirks(status=429), Quirks(status=503)]
    assert fetch(server.pin, cache) == CONTENT
    assert len(server.requests) == 3
    (cache / NAME).unlink()
    server.requests.clear()
    server.always = Quirks(status=503)
    assert "the server answered 503 " in failure(server.pin, cache)
    assert len(server.requests) == ATTEMPTS


def test_silent_server_is_asked_again(server, cache, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(downloads, "TIMEOUTS_SECONDS", (60, 0.5))
    stall = threading.Event()
    server.script = [Quirks(stop_after=100_000, stall=stall)]
    assert fetch(server.pin, cache) == CONTENT
    stall.set()
    assert any("the transfer broke off (timed out)" in message for message in caplog.messages)


def test_address_without_a_server(server, cache):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{taken.getsockname()[1]}"
        message = failure(server.pin, cache, mirror)
    assert re.search(
        rf"{mirror}/{NAME} could not be fetched: .*Connection refused\. Check the network", message
    )
    assert "No connection adapters" in failure(server.pin, cache, "other://place")
    assert names(cache) == []


def test_files_fetched_before_a_failure_are_kept(server, cache):
    files = [SourceFile(f"{server.mirror}/{i}", server.pin.digest) for i in range(3)]
    server.script = [Quirks(), Quirks(status=404)]
    with pytest.raises(DataPrepError, match=f"{files[1].address} could not be fetched"):
        obtain_files(files, cache)
    assert names(cache) == ["0"]
    server.requests.clear()
    assert obtain_files(files, cache) == {str(i): cache / str(i) for i in range(3)}
    assert [request.path for request in server.requests] == ["/data/1", "/data/2"]


def test_file_other_than_the_pinned_one(server, cache):
    file = SourceFile(server.address, f"md5:{hashlib.md5(OTHER).hexdigest()}")
    assert failure(file, cache).startswith(
        f"{server.address} is not the pinned file: expected MD5 {hashlib.md5(OTHER).hexdigest()}, "
        f"found {hashlib.md5(CONTENT).hexdigest()} (300,000 bytes). "
    )
    assert len(server.requests) == 1
    assert names(cache) == []


def test_damaged_file_in_the_cache(server, cache):
    fetch(server.pin, cache)
    (cache / NAME).write_bytes(b"rotten")
    with pytest.raises(DataPrepError, match="Delete it and run the same command again"):
        obtain_files([server.pin], cache)


def test_full_disk_keeps_what_has_arrived(server, cache):
    with nearly_full_disk(100_000):
        message = failure(server.pin, cache)
    assert message.startswith(f"{cache / NAME} cannot be written (File too large). Make room")
    kept = (cache / f".partial-{NAME}").stat().st_size
    assert 100_000 - LOST <= kept <= 100_000
    server.requests.clear()
    assert fetch(server.pin, cache) == CONTENT
    assert server.starts == [kept]


def test_cache_that_cannot_be_written(server, cache):
    cache.write_text("a file")
    assert f"{cache / NAME} cannot be written (File exists)" in failure(server.pin, cache)


@pytest.mark.parametrize("first", ["finishes", "fails"])
def test_processes_that_share_a_cache_fetch_once(server, cache, caplog, first):
    """Two threads stand for them: the lock is of the open file."""
    caplog.set_level("INFO")
    stall = threading.Event()
    server.script = [Quirks(stop_after=100_000, stall=stall)]
    server.script += [Quirks(status=404)] if first == "fails" else []
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(obtain_files, [server.pin], cache)
        wait_until(lambda: bool(server.requests))
        two = pool.submit(obtain_files, [server.pin], cache)
        wait_until(lambda: any("waiting for another" in message for message in caplog.messages))
        stall.set()
        assert two.result() == {NAME: cache / NAME}
        assert (one.exception() is None) == (first == "finishes")
    assert names(cache) == [NAME]
    assert (cache / NAME).read_bytes() == CONTENT
    assert [start is None for start in server.starts].count(True) == 1


# ---- Checksums.


def test_digests(tmp_path):
    path = tmp_path / "greeting"
    path.write_bytes(b"hello\n")
    named = "ce013625030ba8dba906f756967f9e9ca394464a"  # by git hash-object
    assert file_digest(path, "git-sha1") == named
    assert file_digest(path, "md5") == hashlib.md5(b"hello\n").hexdigest()
    check_file(path, sha256(b"hello\n"), "")  # bare
    check_file(path, f"git-sha1:{named}", "")
    with pytest.raises(DataPrepError, match=f"expected SHA-1 of git 00, found {named} "):
        check_file(path, "git-sha1:00", "")
    with pytest.raises(DataPrepError, match=r"^this is not .*: expected SHA-256 00, .* Mend it\.$"):
        check_file(path, "00", "Mend it.", called="this")
    with pytest.raises(DataPrepError, match=r"cannot be read \(Is a directory\)\. Mend it\.$"):
        check_file(tmp_path, "00", "Mend it.")


def test_scratch_folders_of_killed_runs_go_and_partial_downloads_stay(tmp_path):
    (tmp_path / ".partial-killed").mkdir()
    (tmp_path / ".partial-killed/file").write_bytes(CONTENT)
    (tmp_path / ".partial-download").write_bytes(CONTENT)
    with scratch_folder(tmp_path) as scratch:
        assert names(tmp_path) == sorted([scratch.name, ".partial-download"])
    assert names(tmp_path) == [".partial-download"]


# ---- Archives.

WANTED = {"de-en/train.de": b"Ein Satz.\n" * 500, "train.en": b"A sentence.\n" * 500}


def tar(members: dict[str, bytes | str], mode: str = "w") -> bytes:
    """An archive of files, and of links where a text says where they lead."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def targets(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "out").mkdir()
    return dict(zip(WANTED, (tmp_path / "out/source", tmp_path / "out/target"), strict=True))


@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_wanted_members_alone_are_written(tmp_path, targets, prefix, mode):
    unwanted = {"README": b"text", "../up": b"text", "/absolute": b"text", "etc": "/etc"}
    wanted = {f"{prefix}{name}": content for name, content in WANTED.items()}
    (tmp_path / NAME).write_bytes(tar(unwanted | wanted, mode))
    unpack(tmp_path / NAME, targets)
    assert [path.read_bytes() for path in targets.values()] == list(WANTED.values())
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {NAME, "out", "out/source", "out/target"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tar({"de-en/train.de": b"text"}), "does not hold train.en: it is not the archive"),
        (tar(WANTED | {"train.en": "/etc/passwd"}), r"does not hold train\.en"),
        (tar({}), r"does not hold de-en/train\.de, train\.en"),
        (b"<html>not found</html>" * 100, "is damaged .* Delete it and run"),
        (tar(WANTED)[:8_000], "is damaged"),
        (gzip.compress(tar(WANTED))[:-200], "is damaged"),
    ],
    ids=["missing", "link", "empty", "html", "cut off", "cut off gzip"],
)
def test_archives_other_than_expected(tmp_path, targets, content, expected):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(DataPrepError, match=expected):
        unpack(tmp_path / NAME, targets)
