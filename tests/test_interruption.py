"""fairseq-train, interrupted while it learns scales, resumes when given again."""

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
    SCALES_ALONE,
    SHORT_TRAINING,
    SMALL_MODEL,
    Corpus,
    Outcome,
    Training,
    train_here,
)
from test_train import same

from fairseq_gradinit.plugin.log import IterationLog
from fairseq_gradinit.scales.file import SCALES_FILE, Scales

ITERATIONS = 40


FEW = 6


def train_few(corpus: Corpus, save_dir: Path, *arguments: str) -> Training:
    return train_here(
        corpus.translation,
        *(save_dir, *GRADINIT, "--gradinit-iterations", FEW, "--gradinit-save-interval", "2"),
        *("--encoder-layers", "1", "--decoder-layers", "1", "--max-update", "2", *arguments),
    )


@pytest.fixture(scope="module")
def unbroken(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scales, Training]:
    folder = tmp_path_factory.mktemp("unbroken")
    run = train_few(corpus, folder)
    return Scales.load(folder / SCALES_FILE), run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_learning_and_the_same_command_resumes_it(
    number, corpus, tmp_path, unbroken, monkeypatch
):
    """If there is a state; if not, it says so."""
    write = IterationLog.write

    def write_and_signal(log, iteration) -> None:
        write(log, iteration)
        if iteration.index == 3:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(IterationLog, "write", write_and_signal)
        options = ["--gradinit-save-interval", "0", *SCALES_ALONE]
        unsaved = train_few(corpus, tmp_path, *options)
        assert unsaved.code == 128 + number
        assert unsaved.lines("nothing is saved, as --gradinit-save-interval 0 asks")
        assert not (tmp_path / "gradinit_state.json").exists()
        broken = train_few(corpus, tmp_path)
    assert broken.code == 128 + number
    (line,) = broken.lines("GradInit stopped after iteration ")
    assert f", by {signal.Signals(number).name}: the same command " in line
    assert not (tmp_path / SCALES_FILE).exists()
    whole = train_few(corpus, tmp_path)
    assert len(whole.lines(f"of {FEW}, from {tmp_path / 'gradinit_state.json'}")) == 1
    scales, run = unbroken
    assert Scales.load(tmp_path / SCALES_FILE) == scales
    assert whole.updates == run.updates
    assert same(whole.weights, run.weights)


def stop_and_resume(data: Path, save_dir: Path, *words: object) -> Scales:
    """Stop fairseq-train itself when the state has been saved at least twice, and resume it."""
    options = [*SMALL_MODEL, *words, *PLUGIN, *GRADINIT, "--gradinit-iterations", ITERATIONS]
    options += ["--gradinit-save-interval", "4", "--max-update", "2", "--save-dir", save_dir]
    command = [str(word) for word in (BIN / "fairseq-train", data, *options)]
    log, state = save_dir / "log", save_dir / "gradinit_state.json"

    def end_of(process: subprocess.Popen) -> Outcome:
        return Outcome(process.wait(timeout=300), log.read_text())

    with log.open("a") as file:
        streams = {"stdout": file, "stderr": file, "env": {**os.environ, **ENVIRONMENT}}
        process = subprocess.Popen(command, **streams)
        while not state.exists() or len(json.loads(state.read_text())["state"]["history"]) < 8:
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        broken = end_of(process)
        assert broken.code == 128 + signal.SIGTERM
        assert broken.lines("GradInit stopped after iteration ")
        assert "Traceback" not in broken.output
        whole = end_of(subprocess.Popen(command, **streams))
    assert whole.code == 0, whole.output
    assert len(whole.lines(f"of {ITERATIONS}, from {state}")) == 1
    assert len(whole.updates) == 2
    scales = Scales.load(save_dir / SCALES_FILE)
    assert len(scales.history) == ITERATIONS
    return scales


@pytest.mark.slow
def test_the_program_stops_at_a_signal_and_resumes(corpus, tmp_path):
    stop_and_resume(corpus.translation, tmp_path, *SHORT_TRAINING)
