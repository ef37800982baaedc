"""fairseq-train, interrupted while it learns scales, goes on when it is given again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import (
    BIN,
    ENVIRONMENT,
    GRADINIT,
    PLUGIN,
    SHORT_TRAINING,
    SMALL_MODEL,
    Outcome,
    warm_programs,
)

ITERATIONS = 40


def command(data: Path, save_dir: Path, *arguments: str, programs: Path = BIN) -> list[str]:
    """What is interrupted is the program that a user starts."""
    return [
        *(str(programs / "fairseq-train"), str(data), *SMALL_MODEL, *SHORT_TRAINING, *PLUGIN),
        *(*GRADINIT, "--gradinit-iterations", str(ITERATIONS), "--gradinit-save-interval", "4"),
        *("--max-update", "2", "--save-dir", str(save_dir), *arguments),
    ]


def start(words: list[str], save_dir: Path) -> subprocess.Popen:
    save_dir.mkdir(exist_ok=True)
    with (save_dir / "log").open("a") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT})


def finish(data: Path, save_dir: Path, *arguments: str) -> Outcome:
    words = command(data, save_dir, *arguments, programs=warm_programs())
    code = start(words, save_dir).wait(timeout=300)
    return Outcome(code, (save_dir / "log").read_text())


def interrupt(data: Path, save_dir: Path, number: int, *arguments: str) -> Outcome:
    """Send a signal when the state has been saved at least twice."""
    process = start(command(data, save_dir, *arguments), save_dir)
    state = save_dir / "gradinit_state.json"
    while not state.exists() or len(json.loads(state.read_text())["state"]["history"]) < 8:
        assert process.poll() is None, (save_dir / "log").read_text()
        time.sleep(0.02)
    process.send_signal(number)
    code = process.wait(timeout=300)
    return Outcome(code, (save_dir / "log").read_text())


def learned(save_dir: Path) -> dict:
    document = json.loads((save_dir / "gradinit_scales.json").read_text())
    assert len(document["history"]) == ITERATIONS
    return document


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory) -> tuple[dict, list[str]]:
    folder = tmp_path_factory.mktemp("unbroken")
    outcome = finish(corpus.translation, folder)
    assert outcome.code == 0, outcome.output
    return learned(folder), outcome.updates


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_with_the_scales_of_an_unbroken_one(
    number, corpus, tmp_path, unbroken
):
    broken = interrupt(corpus.translation, tmp_path, number)
    assert not (tmp_path / "gradinit_scales.json").exists()
    assert "Traceback" not in broken.output
    if number == signal.SIGKILL:
        assert broken.code == -signal.SIGKILL
    else:
        assert broken.code == 128 + number
        (line,) = broken.lines("GradInit stopped after iteration ")
        assert f", by {signal.Signals(number).name}: the same command goes on from there" in line
    whole = finish(corpus.translation, tmp_path)
    assert whole.code == 0, whole.output
    assert len(whole.lines(f"of {ITERATIONS}, from {tmp_path / 'gradinit_state.json'}")) == 1
    scales, updates = unbroken
    assert learned(tmp_path) == scales
    assert whole.updates == updates


def test_a_torn_state_is_named_and_learning_begins_anew(corpus, tmp_path, unbroken):
    interrupt(corpus.translation, tmp_path, signal.SIGKILL)
    state = tmp_path / "gradinit_state.json"
    state.write_text(state.read_text()[:-100])
    whole = finish(corpus.translation, tmp_path)
    assert whole.code == 0, whole.output
    (line,) = whole.lines("begins anew")
    assert f"WARNING | fairseq_gradinit.state | {state} is damaged" in line
    assert learned(tmp_path) == unbroken[0]


def test_without_a_state_a_stop_says_that_nothing_is_saved(corpus, tmp_path):
    words = command(corpus.translation, tmp_path, "--gradinit-save-interval", "0")
    process = start(words, tmp_path)
    log = tmp_path / "log"
    while "gradinit:" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 128 + signal.SIGTERM
    assert "nothing is saved, as --gradinit-save-interval 0 asks" in log.read_text()
    assert not (tmp_path / "gradinit_state.json").exists()
