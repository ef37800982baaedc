"""A disk that is really full."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import BIN, GRADINIT, SCALES_ALONE, Training, train_here
from test_train import same

pytestmark = pytest.mark.slow


def test_a_full_disk_keeps_an_earlier_gradinit_and_the_run_resumes_when_there_is_room(corpus, disk):
    run_folder = disk.folder / "run"

    def training(*options: str) -> Training:
        words = [*GRADINIT, *SCALES_ALONE, "--max-update", "1", "--no-save", *options]
        return train_here(corpus.translation, run_folder, *words)

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run_folder.iterdir()}

    expected = training().weights
    before = contents()
    for interval, name in (("0", "scales"), ("1", "state")):
        disk.fill()
        run = training("--seed", "5", "--gradinit-save-interval", interval)
        assert f"gradinit_{name}.json: No space left on device; choose a folder" in run.error()
        assert not run.batches
        assert contents() == before
    (disk.folder / "filler").unlink()
    run = training()
    assert run.code == 0, run.output
    assert same(run.weights, expected)
    assert contents().keys() == before.keys()


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
