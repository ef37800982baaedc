"""Chunks of work on several cores: in order, no more than needed at a time, and ended together."""

import math
import subprocess
import sys
import time
from itertools import chain, repeat

import pytest
from conftest import ROOT
from dataprep.parallel import ordered_map

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


PROGRAM = f"""
import os, sys, time
sys.path[:0] = [{str(ROOT / "data-prep")!r}]
from dataprep.parallel import ordered_map

def work(number):
    open(os.path.join("begun", str(os.getpid())), "w").close()
    time.sleep(600)

if __name__ == "__main__":
    list(ordered_map(work, range(4), 2))
"""


@pytest.mark.slow
def test_no_process_outlives_the_one_that_started_it(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    begun = tmp_path / "begun"
    begun.mkdir()
    with subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, stderr=subprocess.PIPE
    ) as process:
        while len(list(begun.iterdir())) < 2:
            time.sleep(0.05)
        process.kill()
        # All that it started write to the same pipe, which ends with the last of them.
        process.communicate(timeout=60)
