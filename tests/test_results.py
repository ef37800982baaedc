"""The file of runs: what is written comes back, from several writers, and damage is named."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_packaging import python

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results import circumstances
from fairseq_gradinit.results import records as results
from fairseq_gradinit.results.records import RunRecord, Settings, append_run, read_runs
from fairseq_gradinit.storage import json_lines

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

texts, counts = st.text(max_size=20), st.integers()
numbers = st.floats(allow_nan=False, allow_infinity=False)
some = st.none() | numbers
words = st.lists(texts, max_size=3).map(tuple)
curves = st.lists(st.tuples(counts, some), max_size=3).map(tuple)
scores = st.builds(
    results.TestScores, texts, bleu=numbers, tokenised_bleu=some, chrf=numbers, signatures=words
)
records = st.builds(
    RunRecord,
    **dict.fromkeys(("recipe", "title", "corpus", "corpus_digest"), texts),
    plateau=numbers,
    settings=st.builds(Settings, lr=numbers, options=words),
    seed=counts,
    commands=words,
    circumstances=st.builds(circumstances.Circumstances),
    status=st.sampled_from(["finished", "diverged"]),
    reason=st.none() | texts,
    **dict.fromkeys(("seconds", "gradinit_seconds", "seconds_per_update"), some),
    tokens_per_second=some,
    **dict.fromkeys(("valid", "training"), curves),
    valid_loss=some,
    scores=st.lists(scores, max_size=2).map(tuple),
    comparison=st.none() | st.builds(results.Comparison, bleu_difference=numbers, p_value=numbers),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "runs.jsonl"


# ---- What is written comes back.


@given(records)
@hypothesis_settings(deadline=None, max_examples=25)
def test_any_record_comes_back_as_it_was(tmp_path_factory, record) -> None:
    file = tmp_path_factory.mktemp("records") / "runs.jsonl"
    append_run(file, record)
    assert read_runs([file]) == [record]
    assert file.read_bytes().count(b"\n") == 1


def test_a_loss_that_is_not_finite_becomes_null(file) -> None:
    valid = results.curve([(1, math.nan), (2, math.inf), (3, 4.5)])
    append_run(file, replace(RUN, valid=valid))
    assert json.loads(file.read_text())["valid"] == [[1, None], [2, None], [3, 4.5]]
    with pytest.raises(ValueError, match="JSON compliant"):
        append_run(file, replace(RUN, valid_loss=math.nan))
    assert len(read_runs([file])) == 1


def test_a_later_run_replaces_an_earlier_one_with_its_key(tmp_path) -> None:
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


def test_a_run_trains_if_it_is_a_bit_and_a_half_below_the_plateau() -> None:
    assert results.trains(8.0, plateau=9.5)
    assert not results.trains(8.001, plateau=9.5)
    assert not results.trains(None, plateau=9.5)


# ---- Several writers, and torn lines.


def test_lines_of_several_processes_stay_whole(file) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from fairseq_gradinit.storage.json_lines import append_line\n"
        "for i in range(100): append_line(Path(sys.argv[1]), [sys.argv[2], i, 'x' * 20000])"
    )

    def write(name: str) -> None:
        command = [sys.executable, "-c", code, str(file), name]
        subprocess.run(command, check=True, cwd=ROOT, timeout=60)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    rows = json_lines.read_lines(file, lambda row: (row[0], row[1], len(row[2])), "a row")
    assert sorted(rows) == [(name, i, 20000) for name in "abcd" for i in range(100)]


@pytest.mark.parametrize("whole", [0, 3], ids=lambda n: f"after {n} lines")
@pytest.mark.parametrize("length", [1, 70_000, None], ids=["start", "long", "no newline"])
def test_a_torn_last_line_is_left_out_and_removed(file, caplog, whole, length) -> None:
    runs = [replace(RUN, seed=seed) for seed in range(whole)]
    for run in runs:
        append_run(file, run)
    torn = json.dumps(asdict(replace(RUN, title="x" * 80_000)))
    with file.open("a") as end:
        end.write(torn[:length])
    assert read_runs([file]) == runs
    assert not caplog.records
    append_run(file, replace(RUN, seed=9))
    assert [run.seed for run in read_runs([file])] == [*range(whole), 9]
    assert "was not written to its end: removed" in caplog.text


def test_a_full_disk_is_told_and_loses_no_other_line(file, monkeypatch) -> None:
    append_run(file, RUN)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    with pytest.raises(GradInitError, match=r"cannot append to .*runs\.jsonl: there is no room"):
        append_run(file, replace(RUN, seed=2))
    monkeypatch.undo()
    assert read_runs([file]) == [RUN]
    append_run(file, replace(RUN, seed=3))
    assert [run.seed for run in read_runs([file])] == [1, 3]


def test_a_file_system_without_locks_gets_the_line_too(file, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("No locks available")

    monkeypatch.setattr(json_lines.fcntl, "flock", refuse)
    append_run(file, RUN)
    assert read_runs([file]) == [RUN]


# ---- Damage.


def changed(**changes: object) -> str:
    return json.dumps({**asdict(RUN), **changes})


def without(name: str) -> str:
    return json.dumps({key: value for key, value in asdict(RUN).items() if key != name})


DAMAGE = {
    "no JSON": ("{", "Expecting property name"),
    "empty": ("", "Expecting value"),
    "no object": ("[]", r"\[\] is not an object"),
    "missing": (without("valid"), "valid is missing"),
    "no version": (without("version"), "version is missing"),
    "later": (changed(version=2), "it has version 2 of the format"),
    "unknown": (changed(mood="good"), "mood is unknown"),
    "number": (changed(plateau="high"), "plateau: 'high' is not a number"),
    "bool": (changed(seed=True), "seed: True is not of type int"),
    "float": (changed(seed=1.0), r"seed: 1\.0 is not of type int"),
    "infinite": (changed(plateau=math.inf), "plateau: inf is not a finite number"),
    "huge": (changed(plateau=10**400), "plateau: "),
    "status": (changed(status="failed"), "status: 'failed' is none of 'finished', 'diverged'"),
    "null": (changed(title=None), "title: None is not of type str"),
    "tuple": (changed(commands="fairseq-train"), "commands: 'fairseq-train' is not an array"),
    "pair": (changed(valid=[[1, 2.0, 3.0]]), r"valid\[0\]: 3 values, not 2"),
    "deep": (
        changed(scores=[{**asdict(RUN.scores[0]), "bleu": "?"}]),
        r"scores\[0\]\.bleu: '\?' is not a number",
    ),
    "dirty": (changed(circumstances={**asdict(MACHINE), "git_dirty": 0}), r"\.git_dirty: 0 is not"),
    "nesting": ("[" * 100_000, "recursion"),
}


@pytest.mark.parametrize(("line", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_is_named(file, line, reason) -> None:
    append_run(file, RUN)
    with file.open("a") as end:
        end.write(f"{line}\n")
    sentence = rf"^line 2 of .*runs\.jsonl is not a record of a run \(.*{reason}.*\): mend"
    with pytest.raises(GradInitError, match=sentence):
        read_runs([file])


def test_bytes_that_are_no_text_are_named(file) -> None:
    file.write_bytes(b"\xff\xfe\xfd\n")
    with pytest.raises(GradInitError, match="line 1 of "):
        read_runs([file])


def test_a_file_that_cannot_be_used_is_named(tmp_path) -> None:
    with pytest.raises(GradInitError, match=r"cannot read .*none\.jsonl: No such file"):
        read_runs([tmp_path / "none.jsonl"])
    with pytest.raises(GradInitError, match=r"cannot append to .*: Is a directory"):
        append_run(tmp_path, RUN)


# ---- Circumstances.


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_circumstances_are_those_of_the_repository(tmp_path) -> None:
    outside = circumstances.current_circumstances(tmp_path)
    assert (outside.git_revision, outside.git_dirty) == (None, False)
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "code")
    clean = circumstances.current_circumstances(tmp_path, workers=3)
    assert clean.git_revision == git(tmp_path, "rev-parse", "HEAD")
    assert (clean.git_dirty, clean.workers) == (False, 3)
    (tmp_path / "results.jsonl").write_text("untracked")
    assert not circumstances.current_circumstances(tmp_path).git_dirty
    (tmp_path / "code.py").write_text("2")
    assert circumstances.current_circumstances(tmp_path).git_dirty


def test_circumstances_are_told_without_waiting_for_torch(tmp_path) -> None:
    done = python(
        "import sys\n"
        "from pathlib import Path\n"
        "from fairseq_gradinit.results.circumstances import current_circumstances\n"
        f"found = current_circumstances(Path({str(tmp_path)!r}))\n"
        "print(found.torch, found.gpus, found.gpu, 'torch' in sys.modules)\n"
    )
    gpus = torch.cuda.device_count()
    name = torch.cuda.get_device_name() if gpus else None
    for_gpus = bool(torch.version.cuda or torch.version.hip)
    assert done.stdout.strip() == f"{torch.__version__} {gpus} {name} {for_gpus}"


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
    assert "2 cores, 2026-11-23, torch 2.13.0, " in circumstances.source("c", "a run", [MACHINE])
