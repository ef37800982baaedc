"""A disk that is really full, and folders that an ordinary user can only read."""

from __future__ import annotations

import collections
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import average_checkpoints
import prepare
import pytest
import resume
import torch
from conftest import BIN, GRADINIT, SCALES_ALONE, train_here
from dataprep import pipeline
from test_data_prep_pipeline import instant_fairseq  # noqa: F401
from test_report import RUN as SHOWN
from test_report import save_run
from test_results import RUN

from fairseq_gradinit.cli import command
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results.records import append_run, read_runs

pytestmark = pytest.mark.slow

NOBODY = 65534
TRAINING = [*GRADINIT, *SCALES_ALONE, "--max-update", "1", "--no-save"]
SMALLER = [*TRAINING, "--encoder-layers", "1", "--decoder-layers", "1"]
NUMBERS = ["numbers", "--source-lang", "de", "--target-lang", "en", "--workers", "1"]


@pytest.mark.parametrize("first", ["state", "scales"])
def test_a_full_disk_keeps_what_an_earlier_gradinit_left(corpus, disk, first):
    options = [*SMALLER, "--gradinit-save-interval", "1" if first == "state" else "0"]
    assert train_here(corpus.translation, disk.folder / "run", *options).code == 0
    before = disk.contents()
    disk.fill()
    run = train_here(corpus.translation, disk.folder / "run", *options, "--seed", "5")
    assert f"gradinit_{first}.json: No space left on device; choose a folder" in run.error()
    assert not run.batches
    assert disk.contents() == before


FITTING = ("gradinit_state.json", "gradinit_scales.json")


def test_gradinit_resumes_when_there_is_room_again(corpus, disk, tmp_path):
    """There is room for state and scales, and not for the file of their effect."""
    whole = train_here(corpus.translation, tmp_path / "run", *TRAINING)
    pages = [-(-(tmp_path / "run" / name).stat().st_size // 4096) for name in FITTING]
    disk.fill(leave=4 * sum(pages))
    run = train_here(corpus.translation, disk.folder / "run", *TRAINING)
    assert "gradinit_effect.json: No space left on device" in run.error()
    assert not run.batches
    (disk.folder / "filler").unlink()
    run = train_here(corpus.translation, disk.folder / "run", *TRAINING)
    assert run.code == 0, run.output
    assert all(torch.equal(tensor, run.weights[name]) for name, tensor in whole.weights.items())
    for path in (tmp_path / "run").iterdir():
        assert (disk.folder / "run" / path.name).exists()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """What the programs read: a run with its checkpoints, and results of recipes."""
    folder = save_run(tmp_path / "inputs", SHOWN)
    append_run(folder / "results.jsonl", RUN)
    model = {"encoder.weight": torch.ones(60, 60), "embed.weight": torch.ones(9, 4)}
    history = [{"num_updates": 2}]
    for update in (1, 2):
        state = {"model": model, "optimizer_history": history}
        torch.save(state, folder / f"checkpoint_1_{update}.pt")
    return folder


def writers(inputs: Path, out: Path) -> dict[str, Callable[[], int]]:
    """Programs that write a file into a folder, by the file."""
    read, page, picture = str(inputs), str(out / "page.html"), str(out / "map.png")
    average = [read, "--last", "2", "--output", str(out / "average.pt")]
    return {
        "page.html": lambda: command.main(["report", read, "--out", page]),
        "map.png": lambda: command.main(["heat-map", f"{read}/results.jsonl", "--out", picture]),
        "average.pt": lambda: average_checkpoints.main(average),
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
    for words in (["table", inputs / "results.jsonl"], ["diff", inputs, inputs]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [BIN / "fairseq-gradinit", *words],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == (2 if words[0] == "diff" else 1)
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


def test_a_torn_checkpoint_on_a_full_disk_is_mended_when_there_is_room(disk, inputs, capsys):
    folder = Path(shutil.copytree(inputs, disk.folder / "run"))
    last = folder / "checkpoint_last.pt"
    last.write_bytes((folder / "checkpoint_1_2.pt").read_bytes()[:1000])
    before = disk.contents()
    disk.fill()
    assert resume.main([str(folder)]) == 1
    assert f"cannot write {last}: No space left on device" in capsys.readouterr().err
    assert disk.contents() == before
    (disk.folder / "filler").unlink()
    assert resume.main([str(folder)]) == 0
    assert last.read_bytes() == (folder / "checkpoint_1_2.pt").read_bytes()


@pytest.mark.usefixtures("instant_fairseq")
def test_preparation_on_a_disk_that_fills_up(disk, tmp_path, monkeypatch, capsys):
    """At any step; what a step before has finished is kept, and the same command goes on."""
    monkeypatch.setattr(pipeline, "require_space", lambda *_: None)
    assert prepare.main([*NUMBERS, "--out", str(tmp_path / "whole")]) == 0
    done = []
    for kib in (8, 200, 400):
        disk.resize(kib)
        assert prepare.main([*NUMBERS, "--out", str(disk.folder / "numbers")]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("prepare.py: error: ")
        assert "No space left on device" in error
        done.append(sorted(path.parent.name for path in disk.folder.glob("numbers/*/step.json")))
    assert done == [[], ["text"], ["text", "tokens"]]
    disk.resize(4096)
    assert prepare.main([*NUMBERS, "--out", str(disk.folder / "numbers")]) == 0
    assert {
        name.removeprefix("numbers/"): content
        for name, content in disk.contents().items()
        if not name.endswith("manifest.json")
    } == {
        str(path.relative_to(tmp_path / "whole")): path.read_bytes()
        for path in (tmp_path / "whole").rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can look into, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """What stands in it is done with the rights of a user who is not root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_may_only_be_read(corpus, inputs, shared, capsys):
    data = shutil.copytree(corpus.translation, shared / "data")
    read = Path(shutil.copytree(inputs, shared / "inputs"))
    kept = shared / "kept"
    kept.mkdir()
    programs = writers(read, kept)
    # Also to have everything imported: Python itself may lie where only root can read.
    assert not any(write() for write in programs.values())
    append_run(kept / "results.jsonl", RUN)
    assert train_here(data, kept, *SMALLER).code == 0
    before = {path: path.read_bytes() for path in kept.iterdir()}
    kept.chmod(0o555)
    with ordinary_user():
        for name, write in programs.items():
            assert write() == 1
            assert f"cannot write {kept / name}: Permission denied" in capsys.readouterr().err
        with pytest.raises(GradInitError, match=r"cannot append to .*: Permission denied; choose"):
            append_run(kept / "results.jsonl", RUN)
        assert prepare.main([*NUMBERS, "--out", str(kept / "numbers")]) == 1
        assert "Permission denied" in capsys.readouterr().err.splitlines()[-1]
        run = train_here(data, kept, *SMALLER, "--seed", "5")
        assert f"cannot write to --save-dir {kept}: Permission denied; " in run.error()
    kept.chmod(0o755)
    assert {path: path.read_bytes() for path in kept.iterdir()} == before
