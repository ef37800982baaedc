"""What fairseq saves can be read again by torch's safe loader, and other objects cannot."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import checkpoints as recipe_checkpoints
import numpy as np
import pytest
import torch
from conftest import train_here, usual_options
from fairseq.data.dictionary import Dictionary

from fairseq_gradinit.plugin.safe_loading import allow_fairseq_checkpoints, read_checkpoint

# How NumPy 1 and 2 call the module of what makes arrays and scalars.
MULTIARRAY = re.compile(rb"numpy\._?core\.multiarray")
NAMES = [b"numpy.core.multiarray", b"numpy._core.multiarray"]


def saved(content: object, *, zipped: bool = True) -> bytes:
    """A file of torch's; if not `zipped`, as before 1.6, and names in it can be replaced."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def loaded(file: bytes) -> Any:
    allow_fairseq_checkpoints()
    return torch.load(io.BytesIO(file), weights_only=True)


@pytest.mark.parametrize("name", NAMES, ids=bytes.decode)
@pytest.mark.parametrize(
    "number",
    [np.float64(0.1), np.int64(-3), np.bool_(True), np.array([3, 1]), np.array([[0.5, 2.0]])],
    ids=repr,
)
def test_numbers_of_numpy(number, name):
    read = loaded(MULTIARRAY.sub(name, saved(number, zipped=False)))
    assert type(read) is type(number)
    np.testing.assert_array_equal(read, number, strict=True)


def test_contents_of_checkpoints():
    labels = Dictionary()
    labels.add_symbol("yes", n=3)
    for content in (argparse.Namespace(arch="lstm", lr=[0.1], share=None), labels):
        assert loaded(saved(content)) == content


class Command:
    """What a pickle makes of it: a call of the shell."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch made",)


@pytest.mark.parametrize(
    "content", [Command(), Path("made"), np.array([Path("made")])], ids=["command", "path", "array"]
)
def test_other_contents_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        loaded(saved({"extra_state": content}))
    assert not list(tmp_path.iterdir())


def test_an_untrusted_checkpoint_is_named_in_one_line_and_not_taken_for_a_broken_one(
    tmp_path, capsys
):
    """The last checkpoint of a run, whole, with an object of a class of the user's own."""
    last = tmp_path / "checkpoint_last.pt"
    torch.save({"optimizer_history": [{"num_updates": 2}]}, tmp_path / "checkpoint_1_2.pt")
    torch.save({"task_state": Path("x")}, last)
    before = last.read_bytes()
    assert recipe_checkpoints.main(["updates", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"checkpoints: cannot read the checkpoint {last}: Weig")
    assert "Unsupported global: GLOBAL pathlib.PosixPath was not an allowed global" in error
    assert error.count("\n") == 1
    assert "\x1b" not in error
    assert last.read_bytes() == before


def test_a_run_with_eval_bleu_is_resumed(corpus, tmp_path):
    """BLEU's counts in the checkpoint are arrays of numpy."""
    options = [
        *("--eval-bleu", "--eval-bleu-detok", "space", "--eval-bleu-remove-bpe"),
        *("--eval-bleu-args", '{"beam": 1, "max_len_a": 1.2, "max_len_b": 10}'),
        *("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"),
    ]
    base = usual_options("--disable-validation", "--max-update")
    for update in ("1", "2"):
        run = train_here(corpus.translation, tmp_path, *options, "--max-update", update, base=base)
        assert run.code == 0, run.output
        assert len(run.updates) == 1
    metrics = read_checkpoint(tmp_path / "checkpoint_last.pt")["extra_state"]["metrics"]["valid"]
    (counts,) = [state["sum"] for _, name, _, state in metrics if name == "_bleu_counts"]
    assert isinstance(counts, np.ndarray)
    assert counts.shape == (4,)
