"""Chunks of work on several cores: in order, no more than needed at a time, and ended together."""

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import chain, repeat
from pathlib import Path

import pytest
from conftest import ROOT
from dataprep import parallel
from dataprep.parallel import chunks, ordered_map


def test_chunks(monkeypatch):
    monkeypatch.setattr(parallel, "CHUNK", 3)
    assert list(chunks(iter(range(7)))) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([])) == []


# The functions are of the standard library: a process that imports a test imports torch too.


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_items_are_taken_as_needed(workers):
    numbers = [20_000, *range(11)]  # the first takes longest
    taken = []

    def items():
        for number in numbers:
            taken.append(number)
            yield number

    results = ordered_map(math.factorial, items(), workers)
    for done, number in enumerate(numbers):
        assert next(results) == math.factorial(number)
        assert len(taken) <= done + 2 * workers
    assert list(results) == []


def test_error_ends_the_work():
    results = ordered_map(int, chain(["10", "11", "twelve"], repeat("13")), 2)
    assert [next(results) for _ in range(2)] == [10, 11]
    with pytest.raises(ValueError, match="twelve"):
        next(results)


def test_single_item_starts_no_process():
    assert list(ordered_map(lambda _: os.getpid(), iter([1]), 3)) == [os.getpid()]
    assert list(ordered_map(int, iter([]), 3)) == []


PROGRAM = """
import os, sys, time
sys.path[:0] = [{data_prep!r}]
from dataprep.parallel import ordered_map

def work(number):
    open({folder!r} + "/" + str(os.getpid()), "w").close()
    time.sleep({seconds})

if __name__ == "__main__":
    try:
        list(ordered_map(work, range(4), 2))
    except KeyboardInterrupt:
        sys.exit("interrupted")
"""


def gone(process: int) -> bool:
    """Whether a process has ended; one that nobody has asked after counts as ended."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@contextmanager
def running(folder, seconds, started, **options):
    """A program whose two processes work for some seconds; so many of them have begun."""
    begun = folder / "begun"
    begun.mkdir()
    program = folder / "program.py"
    program.write_text(
        PROGRAM.format(data_prep=str(ROOT / "data-prep"), folder=str(begun), seconds=seconds)
    )
    with subprocess.Popen(
        [sys.executable, str(program)], stderr=subprocess.PIPE, text=True, **options
    ) as process:
        wait_until(lambda: len(list(begun.iterdir())) >= started)
        yield process


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_one_that_started_it(tmp_path, number):
    with running(tmp_path, seconds=600, started=2) as process:
        process.send_signal(number)
    for path in (tmp_path / "begun").iterdir():
        wait_until(lambda pid=int(path.name): gone(pid))


@pytest.mark.slow
@pytest.mark.parametrize("started", [1, 2])
def test_ctrl_c_is_seen_by_one_process_alone(tmp_path, started):
    with running(
        tmp_path,
        seconds=1,
        started=started,
        start_new_session=True,
        # Shells have what they start in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error == "interrupted\n"
