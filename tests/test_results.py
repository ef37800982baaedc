"""The file of runs: what is written comes back, from several writers, and damage is named."""

from __future__ import annotations

import json
import math
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results import circumstances
from fairseq_gradinit.results import records as results
from fairseq_gradinit.results.records import RunRecord, Settings, append_run, read_runs

MACHINE = circumstances.Circumstances(
    date="2026-11-23T10:00:00+00:00",
    git_revision="0123456789",
    git_dirty=False,
    python="3.11.7",
    torch="2.13.0",
    fairseq="ve-fairseq 0.12.3",
    cpu="CPU",
    cores=2,
    gpu=None,
    gpus=0,
    workers=1,
)
RUN = RunRecord(
    recipe="multi30k/gradinit-adam",
    title="GradInit, Adam",
    corpus="multi30k",
    corpus_digest="d1",
    plateau=9.5,
    settings=Settings(
        model="4+4 layers",
        optimizer="adam",
        optimizer_settings="(0.9, 0.98)",
        lr=2e-3,
        warmup=0,
        updates=2000,
        tokens_per_batch=1000,
        options=("--gradinit",),
    ),
    seed=1,
    commands=("fairseq-train multi30k",),
    circumstances=MACHINE,
    status="finished",
    reason=None,
    seconds=100.0,
    gradinit_seconds=10.0,
    seconds_per_update=0.05,
    tokens_per_second=2000.0,
    valid=((1000, 5.0), (2000, 4.0)),
    training=((2000, None),),
    valid_loss=4.0,
    scores=(results.TestScores("test", 30.0, None, 50.0, ("BLEU|1", "chrF2|1")),),
    comparison=results.Comparison("multi30k/default-adam", 0.5, 0.01, "paired|1"),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "runs.jsonl"


def test_records_come_back_as_they_were(file) -> None:
    bare = replace(RUN, seed=2, status="diverged", reason="it did", valid_loss=None, scores=())
    bare = replace(bare, seconds=None, comparison=None, circumstances=replace(MACHINE, gpu="GPU"))
    for run in (RUN, bare):
        append_run(file, run)
    assert read_runs([file]) == [RUN, bare]
    assert file.read_bytes().count(b"\n") == 2


def test_a_loss_that_is_not_finite_becomes_null(file) -> None:
    valid = results.curve([(1, math.nan), (2, math.inf), (3, 4.5)])
    append_run(file, replace(RUN, valid=valid))
    assert json.loads(file.read_text())["valid"] == [[1, None], [2, None], [3, 4.5]]
    with pytest.raises(ValueError, match="JSON compliant"):
        append_run(file, replace(RUN, valid_loss=math.nan))
    assert len(read_runs([file])) == 1


def test_a_later_run_replaces_an_earlier_one_that_is_alike(tmp_path) -> None:
    first, second = tmp_path / "a" / "1.jsonl", tmp_path / "a" / "2.jsonl"
    others = [
        replace(RUN, seed=2),
        replace(RUN, recipe="multi30k/other"),
        replace(RUN, corpus_digest="d2"),
        replace(RUN, settings=replace(RUN.settings, options=())),
    ]
    for run in (replace(RUN, valid_loss=8.0), *others):
        append_run(first, run)
    append_run(second, replace(RUN, title="Renamed", valid_loss=4.5))
    found = read_runs([first, second])
    assert found == [replace(RUN, title="Renamed", valid_loss=4.5), *others]


def test_lines_of_several_writers_stay_whole(file) -> None:
    runs = [replace(RUN, seed=seed, title="x" * 20_000) for seed in range(100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda run: append_run(file, run), runs))
    assert sorted(read_runs([file]), key=lambda run: run.seed) == runs


def test_a_torn_last_line_is_left_out_and_removed(file, caplog) -> None:
    append_run(file, RUN)
    with file.open("a") as end:
        end.write(json.dumps(asdict(RUN))[:-1])
    assert read_runs([file]) == [RUN]
    append_run(file, replace(RUN, seed=9))
    assert [run.seed for run in read_runs([file])] == [1, 9]
    assert "was not written to its end: removed" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "version: 2 is none of 1"),
        ({"plateau": "high"}, "plateau: 'high' is not a number"),
        ({"circumstances": {**asdict(MACHINE), "git_dirty": 0}}, r"\.git_dirty: 0 is not"),
    ],
)
def test_a_damaged_line_is_named(file, changes, reason) -> None:
    append_run(file, RUN)
    with file.open("a") as end:
        end.write(json.dumps({**asdict(RUN), **changes}) + "\n")
    sentence = rf"^line 2 of .*runs\.jsonl is not a record of a run \(.*{reason}.*\): mend"
    with pytest.raises(GradInitError, match=sentence):
        read_runs([file])


# ---- Circumstances.


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_circumstances_are_those_of_machine_and_repository(tmp_path) -> None:
    outside = circumstances.current_circumstances(tmp_path)
    assert (outside.git_revision, outside.git_dirty) == (None, False)
    assert (outside.torch, outside.gpus) == (torch.__version__, torch.cuda.device_count())
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "code")
    (tmp_path / "results.jsonl").write_text("untracked")
    clean = circumstances.current_circumstances(tmp_path, workers=3)
    assert clean.git_revision == git(tmp_path, "rev-parse", "HEAD")
    assert (clean.git_dirty, clean.workers) == (False, 3)
    (tmp_path / "code.py").write_text("2")
    assert circumstances.current_circumstances(tmp_path).git_dirty


def test_a_source_tells_machines_days_versions_and_revisions() -> None:
    gpus = replace(
        MACHINE, gpu="GPU", gpus=8, workers=8, date="2026-11-25T10:00:00+00:00", torch="2.14"
    )
    dirty = replace(MACHINE, git_revision="abcdefghi", git_dirty=True)
    outside = replace(MACHINE, git_revision=None)
    assert circumstances.source("c", "4 runs", [MACHINE, gpus, dirty, outside]) == (
        "`c`: 4 runs on 8 x GPU, 8 workers and CPU, 2 cores, 2026-11-23 to 2026-11-25, "
        "torch 2.13.0 and 2.14, ve-fairseq 0.12.3, "
        "revision 0123456 and abcdefg with changes and unknown"
    )
