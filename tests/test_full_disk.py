"""A disk that is full."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from conftest import BIN, GRADINIT, SCALES_ALONE, Training, train_here
from test_train import same

pytestmark = pytest.mark.slow


def test_a_full_disk_keeps_an_earlier_gradinit_and_the_run_resumes_when_there_is_room(
    corpus, tmp_path, monkeypatch
):
    def training(*options: str) -> Training:
        words = [*GRADINIT, *SCALES_ALONE, "--max-update", "1", "--no-save", *options]
        return train_here(corpus.translation, tmp_path, *words)

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = training().weights
    before = contents()
    for interval, name in (("0", "scales"), ("1", "state")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            run = training("--seed", "5", "--gradinit-save-interval", interval)
        assert f"gradinit_{name}.json: No space left on device; choose a folder" in run.error()
        assert not run.batches
        assert contents() == before
    assert same(training().weights, expected)


def test_printing_to_a_full_disk():
    """Also where what is printed is less than a buffer holds."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [BIN / "fairseq-gradinit", "doctor"],
            **{"stdout": full, "stderr": subprocess.PIPE, "text": True, "check": False},
        )
    assert done.returncode == 1
    assert done.stderr == (
        "fairseq-gradinit: cannot write to standard output: No space left on device\n"
    )
