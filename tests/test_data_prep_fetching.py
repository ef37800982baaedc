"""Downloads from a server on loopback that misbehaves; digests; archives."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from dataprep import DataPrepError, downloads
from dataprep.checksums import file_digest
from dataprep.downloads import ATTEMPTS, SourceFile, obtain_files
from loopback import serving

CONTENT = random.Random(1).randbytes(300_000)
NAME = "corpus.tgz"
PARTIAL = f".partial-{NAME}"
LOST = downloads._CHUNK_BYTES  # at most, of what was sent before a transfer broke off


@dataclass
class Server:
    """Serves CONTENT under every path.

    Attributes:
        script: the status of the next answers, and after how many bytes of the body the connection
            is closed, or None; `always` is the same of all after them.
        ranges: whether it heeds Range.
        starts: from which byte what was asked for, None if from the beginning.
    """

    mirror: str = ""
    script: list[tuple[int, int | None]] = field(default_factory=list)
    always: tuple[int, int | None] = (200, None)
    ranges: bool = True
    starts: list[int | None] = field(default_factory=list)

    @property
    def pin(self) -> SourceFile:
        digest = hashlib.md5(CONTENT).hexdigest()
        return SourceFile(f"{self.mirror}/{NAME}", f"md5:{digest}")


def handler(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(match[1]) if match else None
            server.starts.append(start)
            status, stop_after = server.script.pop(0) if server.script else server.always
            body = CONTENT if status == 200 else b"<html>sorry</html>"
            if start is not None and server.ranges and status == 200:
                body = CONTENT[start:]
                status = 206 if body else 416
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            # Some servers call a .tgz a tar file in gzip encoding.
            self.send_header("Content-Encoding", "x-gzip")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body[:stop_after])

        def log_message(self, *_: object) -> None:
            """Nothing in the output of the tests."""

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = Server()
    with serving(handler(found)) as found.mirror:
        yield found


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fetch(server: Server, cache: Path) -> None:
    """Obtain the file, which must come out whole and alone."""
    assert obtain_files([server.pin], cache, None) == {NAME: cache / NAME}
    assert os.listdir(cache) == [NAME]
    assert (cache / NAME).read_bytes() == CONTENT


def failure(server: Server, cache: Path) -> str:
    """Obtain a file that cannot be had; returns the message."""
    with pytest.raises(DataPrepError) as caught:
        obtain_files([server.pin], cache, None)
    assert not (cache / NAME).exists()
    return str(caught.value)


def test_broken_transfer_is_resumed_and_a_whole_file_is_kept(server, cache, capsys):
    server.script = [(200, 100_000), (200, 100_000)]
    fetch(server, cache)
    fetch(server, cache)
    assert capsys.readouterr().err == ""  # no progress bar where nobody watches
    beginning, first, second = server.starts
    assert beginning is None
    assert 100_000 - LOST <= first <= 100_000
    assert first + 100_000 - LOST <= second <= first + 100_000


@pytest.mark.parametrize("ranges", [True, False])
def test_next_run_resumes(server, cache, ranges):
    server.ranges = ranges
    # A busy server is asked again, and that a file is missing is told at once.
    server.script = [(429, None), (503, None), (200, 200_000), (404, None)]
    assert "could not be fetched: the server answered 404 Not Found." in failure(server, cache)
    kept = (cache / PARTIAL).stat().st_size
    assert 200_000 - LOST <= kept <= 200_000
    fetch(server, cache)
    assert server.starts == [None, None, None, kept, kept]
    if ranges:  # nothing follows a part that is whole
        (cache / NAME).rename(cache / PARTIAL)
        fetch(server, cache)
        assert server.starts[5:] == [300_000]


def test_attempts_in_vain_end(server, cache):
    server.ranges = False
    server.always = 200, 100_000
    message = failure(server, cache)
    assert len(server.starts) == ATTEMPTS + 1
    assert re.search(rf"/{NAME} could not be fetched: .*\. Check the network, .*--mirror", message)
    assert os.listdir(cache) == [PARTIAL]


def test_file_other_than_the_pinned_one_is_dropped(server, cache):
    cache.mkdir()
    (cache / PARTIAL).write_bytes(bytes(200_000))
    message = failure(server, cache)
    assert f"is not the pinned file: expected {server.pin.digest.replace(':', ' ')}" in message
    assert os.listdir(cache) == []
    fetch(server, cache)
    (cache / NAME).write_bytes(b"rotten")
    with pytest.raises(DataPrepError, match="Delete it and run the same command again"):
        obtain_files([server.pin], cache, None)


def test_digest_of_git(tmp_path):
    (tmp_path / "greeting").write_bytes(b"hello\n")
    named = "ce013625030ba8dba906f756967f9e9ca394464a"  # by git hash-object
    assert file_digest(tmp_path / "greeting", "git-sha1") == named
