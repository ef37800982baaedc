"""A web server on loopback that serves a folder."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Site:
    """A folder on the web.

    Attributes:
        address: without a slash at the end.
        asked: the names of the files that were asked for.
    """

    address: str
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve_folder(folder: Path) -> Iterator[Site]:
    """Serve a folder while the context lasts. Ranges are ignored, as by many simple servers."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            site.asked.append(self.path.rpartition("/")[2])
            super().do_GET()

        def log_message(self, *_: object) -> None:
            """Nothing in the output of the tests."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = Site(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()
