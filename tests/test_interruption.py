"""fairseq-train, interrupted while it learns scales, resumes when given again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    BIN,
    ENVIRONMENT,
    GRADINIT,
    PLUGIN,
    SCALES_ALONE,
    SHORT_TRAINING,
    SMALL_MODEL,
    Corpus,
    Outcome,
    Training,
    train_here,
)

from fairseq_gradinit.plugin.iteration_log import IterationLog

ITERATIONS = 40


def read_scales(save_dir: Path) -> dict:
    return json.loads((save_dir / "gradinit_scales.json").read_text())


# ---- In this process.

FEW = 6


def train_few(corpus: Corpus, save_dir: Path, *arguments: str) -> Training:
    return train_here(
        corpus.translation,
        *(save_dir, *GRADINIT, "--gradinit-iterations", FEW, "--gradinit-save-interval", "2"),
        *("--encoder-layers", "1", "--decoder-layers", "1", "--max-update", "2", *arguments),
    )


@pytest.fixture(scope="module")
def unbroken(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Training]:
    folder = tmp_path_factory.mktemp("unbroken")
    run = train_few(corpus, folder)
    assert run.code == 0, run.output
    return read_scales(folder), run


@pytest.fixture
def interrupt_here(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Send a signal to a training when three iterations have been logged."""

    def interrupt(number: int, *arguments: str) -> Training:
        write = IterationLog.write

        def write_and_signal(log, iteration) -> None:
            write(log, iteration)
            if iteration.index == 3:
                signal.raise_signal(number)

        with monkeypatch.context() as patch:
            patch.setattr(IterationLog, "write", write_and_signal)
            return train_few(corpus, tmp_path, *arguments)

    return interrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_learning_and_the_same_command_resumes_it(
    interrupt_here, number, corpus, tmp_path, unbroken
):
    broken = interrupt_here(number)
    assert broken.code == 128 + number
    (line,) = broken.lines("GradInit stopped after iteration ")
    assert f", by {signal.Signals(number).name}: the same command goes on from there" in line
    assert not (tmp_path / "gradinit_scales.json").exists()
    whole = train_few(corpus, tmp_path)
    assert whole.code == 0, whole.output
    assert len(whole.lines(f"of {FEW}, from {tmp_path / 'gradinit_state.json'}")) == 1
    scales, run = unbroken
    assert read_scales(tmp_path) == scales
    assert whole.updates == run.updates
    assert all(torch.equal(tensor, whole.weights[name]) for name, tensor in run.weights.items())


def test_without_a_state_a_stop_says_that_nothing_is_saved(interrupt_here, tmp_path):
    run = interrupt_here(signal.SIGTERM, "--gradinit-save-interval", "0", *SCALES_ALONE)
    assert run.code == 128 + signal.SIGTERM
    assert run.lines("nothing is saved, as --gradinit-save-interval 0 asks")
    assert not (tmp_path / "gradinit_state.json").exists()


# ---- The program.


def start(data: Path, save_dir: Path) -> subprocess.Popen:
    words = [
        *(BIN / "fairseq-train", data, *SMALL_MODEL, *SHORT_TRAINING, *PLUGIN, *GRADINIT),
        *("--gradinit-iterations", str(ITERATIONS), "--gradinit-save-interval", "4"),
        *("--max-update", "2", "--save-dir", save_dir),
    ]
    save_dir.mkdir(exist_ok=True)
    with (save_dir / "log").open("a") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT})


def finish(data: Path, save_dir: Path) -> Outcome:
    code = start(data, save_dir).wait(timeout=300)
    return Outcome(code, (save_dir / "log").read_text())


def interrupt(data: Path, save_dir: Path, number: int) -> Outcome:
    """Send a signal when the state has been saved at least twice."""
    process = start(data, save_dir)
    state = save_dir / "gradinit_state.json"
    while not state.exists() or len(json.loads(state.read_text())["state"]["history"]) < 8:
        assert process.poll() is None, (save_dir / "log").read_text()
        time.sleep(0.02)
    process.send_signal(number)
    code = process.wait(timeout=300)
    return Outcome(code, (save_dir / "log").read_text())


def learned(save_dir: Path) -> dict:
    document = read_scales(save_dir)
    assert len(document["history"]) == ITERATIONS
    return document


@pytest.mark.slow
def test_the_program_stops_at_a_signal_and_resumes(corpus, tmp_path):
    broken = interrupt(corpus.translation, tmp_path, signal.SIGTERM)
    assert broken.code == 128 + signal.SIGTERM
    assert broken.lines("GradInit stopped after iteration ")
    assert "Traceback" not in broken.output
    whole = finish(corpus.translation, tmp_path)
    assert whole.code == 0, whole.output
    assert len(whole.lines(f"of {ITERATIONS}, from {tmp_path / 'gradinit_state.json'}")) == 1
    assert len(whole.updates) == 2
    learned(tmp_path)
