"""fairseq-train, interrupted while it learns scales, resumes when given again."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
from conftest import GRADINIT, SCALES_ALONE, Corpus, Training, train_here
from test_train import same

from fairseq_gradinit.plugin.log import IterationLog
from fairseq_gradinit.scales.file import SCALES_FILE, Scales

LEARNING = [
    *(*GRADINIT, "--gradinit-iterations", "6", "--gradinit-save-interval", "2"),
    *("--encoder-layers", "1", "--decoder-layers", "1", "--max-update", "2"),
]
write = IterationLog.write


def stop_and_resume(
    corpus: Corpus,
    folder: Path,
    *words: str,
    number: int = signal.SIGTERM,
    base: Sequence[str] = (),
) -> tuple[Training, Training, Training]:
    """A run that is sent a signal at its third iteration, the same again, and one without."""

    def write_and_signal(log, iteration) -> None:
        write(log, iteration)
        if iteration.index == 3:
            signal.raise_signal(number)

    def train(name: str) -> Training:
        return train_here(corpus.translation, folder / name, *LEARNING, *words, base=base)

    with mock.patch.object(IterationLog, "write", write_and_signal):
        broken = train("broken")
    assert broken.code == 128 + number, broken.output
    (line,) = broken.lines("GradInit stopped after iteration ")
    assert f", by {signal.Signals(number).name}: " in line
    assert not (folder / "broken" / SCALES_FILE).exists()
    return broken, train("broken"), train("unbroken")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_learning_and_the_same_command_resumes_it(number, corpus, tmp_path):
    broken, resumed, unbroken = stop_and_resume(corpus, tmp_path, number=number)
    assert broken.lines(": the same command goes on from there")
    assert resumed.lines(f"of 6, from {tmp_path / 'broken' / 'gradinit_state.json'}")
    scales, expected = (Scales.load(tmp_path / f / SCALES_FILE) for f in ("broken", "unbroken"))
    assert scales == expected
    assert resumed.updates == unbroken.updates
    assert same(resumed.weights, unbroken.weights)


def test_without_a_state_the_learning_starts_over(corpus, tmp_path):
    words = ["--gradinit-save-interval", "0", *SCALES_ALONE]
    broken, again, _ = stop_and_resume(corpus, tmp_path, *words)
    assert broken.lines("nothing is saved, as --gradinit-save-interval 0 asks")
    assert not again.lines("gradinit_state.json")
