"""Chunks of work on several cores: in order, no more than needed at a time, and ended together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from dataprep import parallel
from dataprep.parallel import chunks, ordered_map


def slow_first(number):
    """Takes longest for the first, so that an unordered map would give it last."""
    time.sleep(0.3 if number == 0 else 0)
    if number == 13:
        raise ValueError("an unlucky one")
    return number * number


def test_chunks(monkeypatch):
    monkeypatch.setattr(parallel, "CHUNK", 3)
    assert list(chunks(iter(range(7)))) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([])) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_items_are_taken_as_needed(workers):
    taken = []

    def items():
        for number in range(12):
            taken.append(number)
            yield number

    results = ordered_map(slow_first, items(), workers)
    for number in range(12):
        assert next(results) == number * number
        assert len(taken) <= number + 2 * workers
    assert list(results) == []


def process_of(number):
    return os.getpid()


def test_a_single_item_starts_no_process():
    assert list(ordered_map(process_of, iter([1]), 3)) == [os.getpid()]
    assert list(ordered_map(process_of, iter([]), 3)) == []
    assert os.getpid() not in set(ordered_map(process_of, iter([1, 2]), 3))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_ends_the_work(workers):
    results = ordered_map(slow_first, range(10, 1_000_000), workers)
    assert [next(results) for _ in range(3)] == [100, 121, 144]
    with pytest.raises(ValueError, match="an unlucky one"):
        next(results)


PROGRAM = """
import os, sys, time
sys.path[:0] = [{data_prep!r}]
from dataprep.parallel import ordered_map

def work(number):
    open({folder!r} + "/" + str(os.getpid()), "w").close()
    time.sleep(60)

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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_one_that_started_it(tmp_path, number):
    folder = tmp_path / "started"
    folder.mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(data_prep=str(ROOT / "data-prep"), folder=str(folder)))
    with subprocess.Popen([sys.executable, str(program)], stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 30
        while len(started := list(folder.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
    workers = [int(path.name) for path in started]
    assert len(workers) == 2
    until = time.monotonic() + 10
    while not all(map(gone, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(map(gone, workers))


@pytest.mark.parametrize("wait", [0.0, 0.3], ids=["starting", "working"])
def test_ctrl_c_is_seen_by_one_process_alone(tmp_path, wait):
    folder = tmp_path / "started"
    folder.mkdir()
    program = tmp_path / "program.py"
    source = PROGRAM.format(data_prep=str(ROOT / "data-prep"), folder=str(folder))
    program.write_text(source.replace("time.sleep(60)", "time.sleep(1)"))
    with subprocess.Popen(
        [sys.executable, str(program)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Shells have what they start in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        until = time.monotonic() + 30
        while not list(folder.iterdir()) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert error == "interrupted\n"
