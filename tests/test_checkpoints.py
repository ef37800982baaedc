"""What fairseq saves can be read again by torch's safe loader, and nothing else can."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints as recipe_checkpoints
import numpy as np
import pytest
import torch
from conftest import train_here, usual_options
from fairseq.data.dictionary import Dictionary
from fairseq.logging import meters
from omegaconf import OmegaConf

from fairseq_gradinit.cli import command
from fairseq_gradinit.plugin.safe_loading import allow_fairseq_checkpoints, read_checkpoint
from fairseq_gradinit.scales.file import BlockScale, Scales

# How NumPy 1 and 2 call the module of what makes arrays and scalars.
MULTIARRAY = re.compile(rb"numpy\._?core\.multiarray")
NAMES = [b"numpy.core.multiarray", b"numpy._core.multiarray"]


@pytest.fixture(autouse=True)
def _allowed() -> None:
    allow_fairseq_checkpoints()


def saved(content: object, *, zipped: bool = True) -> bytes:
    """A file of torch's; if not `zipped`, as before 1.6, and names in it can be replaced."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def loaded(file: bytes) -> Any:
    return torch.load(io.BytesIO(file), weights_only=True)


# ---- What fairseq saves.


def configuration() -> Any:
    """As it was saved from October 2020 to March 2021."""
    model = argparse.Namespace(arch="lstm")
    config = {"common": {"seed": 1, "user_dir": None}, "optimization": {"lr": [0.1, 0.2]}}
    return OmegaConf.create({**config, "model": model}, flags={"allow_objects": True})


def metrics() -> list[Any]:
    found = meters.MetersDict()
    for i, value in enumerate((np.array([3, 1]), np.float64(0.5), torch.tensor(2.0), 1)):
        found.add_meter(f"average {i}", meters.AverageMeter(), 1)
        found[f"average {i}"].update(value)
    found.add_meter("time", meters.TimeMeter(n=np.int64(2)), 1)
    found.add_meter("stopwatch", meters.StopwatchMeter(), 1)
    found.add_meter("sum", meters.SumMeter(), 1)
    found["sum"].update(np.arange(2.0))
    return found.state_dict()


@pytest.mark.parametrize("name", NAMES, ids=bytes.decode)
@pytest.mark.parametrize(
    "number",
    [
        *(np.float64(0.1), np.float16(0.1), np.int64(-3), np.bool_(True), np.array([3, 1])),
        *(np.array(0.5), np.array([[True], [False]]), np.array([1, 256], ">i2")),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ],
    ids=repr,
)
def test_numbers_of_numpy(number, name):
    expected = pickle.loads(pickle.dumps(number))
    read = loaded(MULTIARRAY.sub(name, saved(number, zipped=False)))
    assert isinstance(read, type(number))
    np.testing.assert_array_equal(read, expected, strict=True)
    # A program without the plugin can read what is saved again.
    assert saved(read) == saved(expected)


def test_results_of_an_array_that_was_read():
    read = loaded(saved(np.array([3, 1])))
    for result in (read + read, 2 * read, read / 2, np.maximum(read, 2)):
        assert type(result) is np.ndarray
    assert type(read.sum()) is type(read[0]) is np.int64


@pytest.mark.parametrize(
    "content",
    [
        argparse.Namespace(arch="lstm", lr=[0.1], share=None),
        configuration(),
        OrderedDict(valid=metrics()),
        {"size": torch.Size([2]), "type": torch.float16, "device": torch.device("cpu")},
        {"betas": (0.9, 0.98), "names": {"a"}, "best": None, "shuffle": True, "data": b"bytes"},
    ],
    ids=["Namespace", "OmegaConf", "metrics", "torch", "python"],
)
def test_contents_of_checkpoints(content):
    read = loaded(saved(content))
    assert type(read) is type(content)
    assert repr(read).replace("_Array(", "array(") == repr(content)


def test_labels_in_the_state_of_a_task():
    labels = Dictionary()
    labels.add_symbol("yes", n=3)
    assert loaded(saved({"dictionaries": [labels]})) == {"dictionaries": [labels]}


# ---- What nobody should load.


class Reduced:
    """What a pickle makes of it: a call, and then the state that the result is given."""

    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...], *state: Any) -> None:
        self.reduced = (call, arguments, *state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def array(dtype: object, data: object) -> Reduced:
    """One number, as numpy writes it."""
    call, arguments, _ = np.zeros(1).__reduce__()
    return Reduced(call, arguments, (1, (1,), dtype, False, data))


def dtype(code: object, fields: object = None, flags: int = 0) -> Reduced:
    names = None if fields is None else tuple(fields)
    return Reduced(np.dtype, (code, False, True), (3, "<", None, names, fields, -1, -1, flags))


ADDRESS = struct.pack("<q", 0x41414141)
SCALAR = np.float64(1).__reduce__()[0]
OTHERS = {
    "system": Reduced(os.system, ("touch made",)),
    "exec": Reduced(exec, ("open('made', 'w')",)),
    "getattr": Reduced(getattr, (Path("made"), "touch")),
    "class": Path("made"),
    "array of objects": array(dtype("O8"), [1]),
    "array of addresses": array(dtype("O8"), ADDRESS),
    "array of structures": array(dtype("V8", {"a": (dtype("O8"), 0)}), ADDRESS),
    "array of named objects": array(dtype([("a", "O")]), ADDRESS),
    "array of strings": array(dtype("S8"), ADDRESS),
    "array of forged fields": array(dtype("f8", {"a": (dtype("O8"), 0)}), ADDRESS),
    "array without dtype": array("f8", ADDRESS),
    "scalar that is an object": Reduced(SCALAR, (dtype("O8"), [1])),
    "scalar without dtype": Reduced(SCALAR, ("f8", ADDRESS)),
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_other_contents_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        loaded(saved({"extra_state": content}))
    assert not list(tmp_path.iterdir())


def test_forged_state_of_a_dtype_has_no_effect():
    """numpy believes it."""
    read = loaded(saved(array(dtype("f8", {"a": (dtype("f8"), 0)}, flags=63), ADDRESS)))
    assert read.dtype == np.float64
    assert read.dtype.fields is None
    assert not read.dtype.hasobject


def test_an_array_is_filled_once():
    read = loaded(saved(np.zeros(3)))
    with pytest.raises(pickle.UnpicklingError, match="numpy would not have written"):
        read.__setstate__(np.zeros(1).__reduce__()[2])


# ---- Programs.


def test_an_untrusted_checkpoint_is_named_in_one_line_and_not_taken_for_a_broken_one(
    tmp_path, monkeypatch, capsys
):
    """The last checkpoint of a run, whole, with an object of a class of the user's own."""
    monkeypatch.chdir(tmp_path)
    torch.save({"optimizer_history": [{"num_updates": 2}]}, "checkpoint_1_2.pt")
    torch.save({"task_state": Path("x")}, "checkpoint_last.pt")
    before = Path("checkpoint_last.pt").read_bytes()
    Scales((BlockScale("fc.weight", (2, 2), 0.5, "learned"),), {}).save(Path("a.json"))
    assert command.main(["apply", "a.json", "checkpoint_last.pt", "--out", "new.pt"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fairseq-gradinit: cannot read the checkpoint checkpoint_last.pt: Weig")
    assert "two options, do those steps only if you trust the source of the checkpoint. " in error
    assert "Unsupported global: GLOBAL pathlib.PosixPath was not an allowed global" in error
    assert error.endswith(".html.\n")
    assert error.count("\n") == 1
    assert not re.search(r"[\x1b\t]|  ", error)
    assert recipe_checkpoints.main(["updates", "."]) == 1
    assert "Unsupported global: GLOBAL pathlib.PosixPath" in capsys.readouterr().err
    assert Path("checkpoint_last.pt").read_bytes() == before


def test_fairseq_is_imported_where_a_checkpoint_needs_it(tmp_path):
    file = tmp_path / "checkpoint_last.pt"
    file.write_bytes(saved({"cfg": configuration()}))
    trusted = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        assert read_checkpoint(file)["cfg"] == configuration()
    finally:
        torch.serialization.add_safe_globals(trusted)


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
