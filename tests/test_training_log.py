"""What is read of a log of fairseq-train, whatever happened to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_log import TrainingLog

NOT_FINITE = "FloatingPointError: gradients are Nan/Inf"
SKIPPED = "GradInit: 4 losses were not finite, more than may be skipped of 8"


def inner(time: str, update: int) -> str:
    row = f'{{"loss": "{9 - update}", "num_updates": "{update}", "wall": "1"}}'
    return f"2026-11-26 {time} | INFO | train_inner | {row}\n"


def settings(time: str) -> str:
    return f"2026-11-26 {time} | INFO | fairseq_cli.train | {{'_name': None}}\n"


def norms(*values: str) -> str:
    """What fairseq says of gradients that differ between processes."""
    ruler = "-" * 80
    ranks = "\n".join(f"rank   {rank} = {value}" for rank, value in enumerate(values))
    error = "FloatingPointError: Fatal error: gradients are inconsistent between workers. Try ..."
    return f"{error}\n{ruler}\ngrad_norm across the workers:\n{ranks}\n\n{ruler}\n"


def read(folder: Path, text: str) -> TrainingLog:
    (folder / "train.log").write_text(text)
    return TrainingLog.read(folder / "train.log")


def test_time_is_that_of_all_processes_without_what_lies_between(tmp_path) -> None:
    first = settings("10:00:00") + inner("10:00:05", 1) + inner("10:00:09", 2)
    between = "2026-11-26 12:00:00 | INFO | fairseq.tasks | before the settings\n"
    second = settings("12:00:01") + inner("12:00:04", 2) + inner("12:00:07", 3)
    found = read(tmp_path, first + between + second)
    assert found.seconds == 9 + 6
    assert [update for update, _ in found.training] == [1, 2, 3]


def test_a_line_that_was_cut_is_left_out(tmp_path) -> None:
    torn = '2026-11-26 10:00:06 | INFO | train_inner | {"loss": "1' + settings("10:01:00")
    text = settings("10:00:00") + inner("10:00:05", 1) + torn + inner("10:01:05", 2)
    assert read(tmp_path, text).training == [(1, 8.0), (2, 7.0)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{NOT_FINITE}\n", NOT_FINITE),
        (f"[rank1]: {NOT_FINITE}\n", NOT_FINITE),
        (norms("nan", "inf"), "FloatingPointError: gradient norms of the processes: nan, inf"),
        (norms("1.25000000", "1.50000000"), None),
        ("ValueError: FloatingPointError is no word of this\n", None),
        (f"ERROR | {SKIPPED}\n", SKIPPED),
    ],
)
def test_divergence_is_told_from_other_faults(tmp_path, text, reason) -> None:
    assert read(tmp_path, text).diverged == reason
