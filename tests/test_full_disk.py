"""A disk that is really full, and folders that an ordinary user can only read."""

from __future__ import annotations

import collections
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoints
import prepare
import pytest
import torch
from conftest import BIN, GRADINIT, SCALES_ALONE, Training, train_here
from dataprep import pipeline
from test_data_prep_pipeline import instant_fairseq  # noqa: F401
from test_report import RUN as SHOWN
from test_report import save_run
from test_results import RUN
from test_train import same

from fairseq_gradinit.cli import command
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results.records import append_run, read_runs

pytestmark = pytest.mark.slow

NOBODY = 65534
TRAINING = [*GRADINIT, *SCALES_ALONE, "--max-update", "1", "--no-save"]
NUMBERS = ["numbers", "--source-lang", "de", "--target-lang", "en", "--workers", "1"]


def test_a_full_disk_keeps_an_earlier_gradinit_and_the_run_resumes_when_there_is_room(corpus, disk):
    def training(*options: str) -> Training:
        return train_here(corpus.translation, disk.folder / "run", *TRAINING, *options)

    expected = training().weights
    before = disk.contents()
    for interval, name in (("0", "scales"), ("1", "state")):
        disk.fill()
        run = training("--seed", "5", "--gradinit-save-interval", interval)
        assert f"gradinit_{name}.json: No space left on device; choose a folder" in run.error()
        assert not run.batches
        assert disk.contents() == before
    # There is room for state and scales, and not for the file of their effect.
    shutil.rmtree(disk.folder / "run")
    sizes = (len(before[f"run/gradinit_{name}.json"]) for name in ("state", "scales"))
    disk.fill(leave=4 * sum(-(-size // 4096) for size in sizes))
    assert "gradinit_effect.json: No space left on device" in training().error()
    (disk.folder / "filler").unlink()
    run = training()
    assert run.code == 0, run.output
    assert same(run.weights, expected)
    assert disk.contents().keys() == before.keys()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """What the programs read: a run with its checkpoints, and results of recipes."""
    folder = save_run(tmp_path / "inputs", SHOWN)
    append_run(folder / "results.jsonl", RUN)
    model = {"encoder.weight": torch.ones(60, 60), "embed.weight": torch.ones(9, 4)}
    for update in (1, 2):
        state = {"model": model, "optimizer_history": [{"num_updates": 2}]}
        torch.save(state, folder / f"checkpoint_1_{update}.pt")
    return folder


def writers(inputs: Path, out: Path) -> dict[str, Callable[[], int]]:
    """Programs that write a file into a folder, by the file."""
    read, page, picture = str(inputs), str(out / "page.html"), str(out / "map.png")
    average = ["average", read, "--last", "2", "--output", str(out / "average.pt")]
    return {
        "page.html": lambda: command.main(["report", read, "--out", page]),
        "map.png": lambda: command.main(["heat-map", f"{read}/results.jsonl", "--out", picture]),
        "average.pt": lambda: checkpoints.main(average),
    }


def test_programs_on_a_full_disk(disk, inputs, capsys):
    for name, write in writers(inputs, disk.folder).items():
        (disk.folder / name).write_text("old")
        disk.fill()
        assert write() == 1
        expected = f"cannot write {disk.folder / name}: No space left on device; choose a folder"
        assert expected in capsys.readouterr().err
        assert disk.contents() == {name: b"old"}
        (disk.folder / "filler").unlink()
        assert write() == 0
        (disk.folder / name).unlink()


def test_printing_to_a_full_disk(inputs):
    """Also where what is printed is less than a buffer holds."""
    for words, code in ((["table", inputs / "results.jsonl"], 1), (["diff", inputs, inputs], 2)):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [BIN / "fairseq-gradinit", *words],
                **{"stdout": full, "stderr": subprocess.PIPE, "text": True, "check": False},
            )
        assert done.returncode == code
        assert done.stderr == (
            "fairseq-gradinit: cannot write to standard output: No space left on device\n"
        )


def test_a_line_of_results_on_a_full_disk(disk):
    file = disk.folder / "results.jsonl"
    append_run(file, RUN)
    disk.fill()
    runs = (replace(RUN, seed=seed) for seed in itertools.count(2))
    with pytest.raises(GradInitError, match=r"cannot append to .*: .*(no room|No space)"):
        collections.deque((append_run(file, run) for run in runs), maxlen=0)
    kept = read_runs([file])
    assert [run.seed for run in kept] == [1, *range(2, 1 + len(kept))]
    (disk.folder / "filler").unlink()
    append_run(file, replace(RUN, seed=100))
    assert read_runs([file]) == [*kept, replace(RUN, seed=100)]


@pytest.mark.usefixtures("instant_fairseq")
def test_preparation_on_a_disk_that_fills_up(disk, tmp_path, monkeypatch, capsys):
    """At any step; what a step before has finished is kept, and the same command resumes."""
    monkeypatch.setattr(pipeline, "require_space", lambda *_: None)
    whole = tmp_path / "whole"
    assert prepare.main([*NUMBERS, "--out", str(whole)]) == 0
    done = []
    for kib in (8, 200, 400):
        disk.resize(kib)
        assert prepare.main([*NUMBERS, "--out", str(disk.folder)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("prepare.py: error: ")
        assert "No space left on device" in error
        done.append(sorted(path.parent.name for path in disk.folder.glob("*/step.json")))
    assert done == [[], ["text"], ["text", "tokens"]]
    disk.resize(4096)
    assert prepare.main([*NUMBERS, "--out", str(disk.folder)]) == 0
    paths = (path for path in whole.rglob("*") if path.is_file())
    expected = {str(path.relative_to(whole)): path.read_bytes() for path in paths}
    found = disk.contents()
    assert found.pop("manifest.json") != expected.pop("manifest.json")
    assert found == expected


def test_a_folder_that_may_only_be_read(corpus, inputs, capsys):
    # Every user can look into such a folder, unlike those of pytest.
    with tempfile.TemporaryDirectory() as name:
        (shared := Path(name)).chmod(0o755)
        data = shutil.copytree(corpus.translation, shared / "data")
        read = Path(shutil.copytree(inputs, shared / "inputs"))
        (kept := shared / "kept").mkdir()
        programs = writers(read, kept)
        # Also to have everything imported: Python itself may lie where only root can read.
        assert not any(write() for write in programs.values())
        append_run(kept / "results.jsonl", RUN)
        assert train_here(data, kept, *TRAINING).code == 0
        before = {path: path.read_bytes() for path in kept.iterdir()}
        kept.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(NOBODY)
        try:
            for name, write in programs.items():
                assert write() == 1
                assert f"cannot write {kept / name}: Permission denied" in capsys.readouterr().err
            with pytest.raises(GradInitError, match=r"cannot append to .*: Permission denied; "):
                append_run(kept / "results.jsonl", RUN)
            assert prepare.main([*NUMBERS, "--out", str(kept / "numbers")]) == 1
            assert "Permission denied" in capsys.readouterr().err.splitlines()[-1]
            run = train_here(data, kept, *TRAINING, "--seed", "5")
            assert f"cannot write to --save-dir {kept}: Permission denied; " in run.error()
        finally:
            os.seteuid(user)
            kept.chmod(0o755)
        assert {path: path.read_bytes() for path in kept.iterdir()} == before
