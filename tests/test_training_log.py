"""What is read of a log of fairseq-train, whatever happened to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_log import TrainingLog

RULER = "-" * 80
NORMS = """FloatingPointError: Fatal error: gradients are inconsistent between workers. Try ...
{ruler}
grad_norm across the workers:
rank   0 = {first}
rank   1 = {second}

{ruler}
"""


def inner(time: str, update: int) -> str:
    row = f'{{"loss": "{9 - update}", "num_updates": "{update}", "wall": "1"}}'
    return f"2026-11-26 {time} | INFO | train_inner | {row}\n"


def settings(time: str) -> str:
    return f"2026-11-26 {time} | INFO | fairseq_cli.train | {{'_name': None}}\n"


@pytest.fixture
def read(tmp_path: Path):
    def read_text(text: str) -> TrainingLog:
        (tmp_path / "train.log").write_text(text)
        return TrainingLog.read(tmp_path / "train.log")

    return read_text


def test_time_is_that_of_all_processes_without_what_lies_between(read) -> None:
    first = settings("10:00:00") + inner("10:00:05", 1) + inner("10:00:09", 2)
    between = "2026-11-26 12:00:00 | INFO | fairseq.tasks | before the settings\n"
    second = settings("12:00:01") + inner("12:00:04", 2) + inner("12:00:07", 3)
    found = read(first + between + second)
    assert found.seconds == 9 + 6
    assert [update for update, _ in found.training] == [1, 2, 3]
    assert read("nothing\n").seconds is None


def test_a_line_that_was_cut_is_left_out(read) -> None:
    torn = '2026-11-26 10:00:06 | INFO | train_inner | {"loss": "1' + settings("10:01:00")
    found = read(settings("10:00:00") + inner("10:00:05", 1) + torn + inner("10:01:05", 2))
    assert found.training == [(1, 8.0), (2, 7.0)]


@pytest.mark.parametrize("rank", ["", "[rank1]: "])
@pytest.mark.parametrize(
    ("traceback", "reason"),
    [
        (
            "FloatingPointError: gradients are Nan/Inf\n",
            "FloatingPointError: gradients are Nan/Inf",
        ),
        (
            NORMS.format(ruler=RULER, first="nan", second="inf"),
            "FloatingPointError: gradient norms of the processes: nan, inf",
        ),
        (NORMS.format(ruler=RULER, first="1.25000000", second="1.50000000"), None),
        ("ValueError: FloatingPointError is no word of this\n", None),
    ],
    ids=["one process", "not finite", "another fault", "no divergence"],
)
def test_divergence_is_told_from_other_faults(read, rank, traceback, reason) -> None:
    lines = traceback.splitlines(keepends=True)
    assert read("".join(f"{rank}{line}" for line in lines)).diverged == reason


def test_gradinit_can_diverge_too(read) -> None:
    line = "GradInit: 4 losses were not finite, more than may be skipped of 8"
    assert read(f"ERROR | {line}\n").diverged == line
