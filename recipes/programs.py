"""Programs started in a tuned environment with their output in a file, and locks they inherit."""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cases import RunError

log = logging.getLogger("runner")

BIN = Path(sys.executable).parent
WATCH_SECONDS = 0.5

Watch = Callable[[str], None]
"""Is told what a program has printed since the last time."""


def environment(threads: int | None = None) -> dict[str, str]:
    """Of programs with so many threads; None leaves it to the user's OMP_NUM_THREADS, or torch."""
    # glibc returns freed memory at every step unless told otherwise: 10 to 30 % of the time.
    keep = str(1 << 30)
    tuning = {f"MALLOC_{name}_": keep for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD")}
    if threads is not None:
        tuning["OMP_NUM_THREADS"] = str(threads)
    return {
        **os.environ,
        **tuning,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }


def shown(command: Sequence[str]) -> str:
    """A command as one would type it; the path of a program that is not on PATH is added."""
    name, *rest = command
    return shlex.join([name if shutil.which(name) else str(BIN / name), *rest])


def execute(
    command: Sequence[str], log_file: Path, watch: Watch | None = None, threads: int | None = None
) -> None:
    """Run a command with its output at the end of a file.

    Raises:
        RunError: it failed; the message names it, its last line and the file.
    """
    with log_file.open("ab") as output, log_file.open(errors="replace") as printed:
        printed.seek(0, os.SEEK_END)
        with subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(threads),
            close_fds=False,
        ) as process:
            try:
                while watch and process.poll() is None:
                    watch(printed.read())
                    time.sleep(WATCH_SECONDS)
                process.wait()
            except KeyboardInterrupt:
                process.wait()  # Ctrl-C has reached it too, and it may be saving its state.
                raise
        if watch:
            watch(printed.read())
    if process.returncode != 0:
        lines = log_file.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        name = Path(command[0]).name
        full = "; the disk is full" if shutil.disk_usage(log_file.parent).free < 1 << 20 else ""
        raise RunError(f"{name} failed: {lines[-1][:300]} (its whole output: {log_file}){full}")


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock of a file; if this program is killed, those that it has started still hold it.

    Raises:
        RunError: another program has it, and `wait` is false.
    """
    with path.open("a") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise RunError(
                f"another program is at work in {path.parent}: wait for it, or end it"
            ) from error
        except OSError:
            log.warning("%s is on a file system without locks: run nothing else there", path)
        yield
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
