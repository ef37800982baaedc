"""Batches that cannot be used, not finite or too large for the memory; disks that are full."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import BIN
from tiny import SPOILERS, loss_of, make_model, make_pair

from fairseq_gradinit.engine.batch_pairs import BatchPair
from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learner import Learned
from fairseq_gradinit.engine.learning import learn_scales
from fairseq_gradinit.engine.state import StateFile
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.storage.files import write_atomically

PAIRS = [make_pair(seed) for seed in range(12)]
CONFIGS = {"objective": {}, "constraint": {"gamma": 1e-3}}
# Losses that an iteration takes of a pair of two micro-batches each, with exact products.
CALLS = 4


def learn(model, loss, pairs, halve=None, state_file=None, **settings) -> Learned:
    config = GradInitConfig(**{"eta": 0.05, "iterations": 4, "second_order": "exact", **settings})
    blocks = collect_blocks({"": model}, "fixed")
    with deterministic(model):
        return learn_scales(blocks, loss, pairs, config, halve=halve, state_file=state_file)


def spoiled_at(model, bad_calls, spoil):
    """The loss, spoiled in some of its calls, counted from 0."""
    calls = iter(range(10**6))

    def loss(tokens):
        value, count = loss_of(model)(tokens)
        return (spoil(value, model.out.bias) if next(calls) in bad_calls else value), count

    return loss


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("spoil", "iteration", "call"), [("nan", 0, 0), ("infinity", 2, 1), ("gradient", 2, 3)]
)
def test_a_batch_that_is_not_finite_is_skipped(kind, spoil, iteration, call, caplog):
    """It is as if it had not been drawn."""
    model = make_model()
    kept = PAIRS[:iteration] + PAIRS[iteration + 1 :]
    expected = learn(model, loss_of(model), kept, **CONFIGS[kind])
    model = make_model()
    loss = spoiled_at(model, {iteration * CALLS + call}, SPOILERS[spoil])
    caplog.clear()
    found = learn(model, loss, PAIRS, **CONFIGS[kind])
    assert found.scale_of == expected.scale_of
    assert found.history == expected.history
    assert found.skipped == 1
    assert len([r for r in caplog.records if "the batch is skipped" in r.message]) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        # The fourth iteration and all after it.
        (
            range(12, 1000),
            r"the loss is nan in GradInit iteration 4, and 3 batches are more than may be "
            r"skipped; the scale of \S+ grew most, to 1\.\d+: lower eta",
        ),
        (range(1000), "not one batch could be used: check that the model"),
    ],
    ids=["later", "all"],
)
def test_too_many_bad_batches_are_an_error(bad, message):
    model = make_model()
    loss = spoiled_at(model, bad, SPOILERS["nan"])
    with pytest.raises(GradInitError, match=message):
        learn(model, loss, PAIRS, iterations=9, max_skipped=2)
    assert all(map(torch.equal, model.parameters(), make_model().parameters()))


def little_memory(model, rows: int):
    """A loss that fits batches of so many rows, and fails in the backward pass of larger ones."""

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.\nmore")

    def loss(tokens):
        value, count = loss_of(model)(tokens)
        if len(tokens) > rows:
            value.register_hook(fail)
        return value, count

    return loss


def halve(tokens: torch.Tensor) -> list[torch.Tensor]:
    return list(tokens.chunk(2)) if len(tokens) > 1 else []


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_too_large_is_halved_until_it_fits(kind, caplog):
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(11, (6, 5), generator=rng) for _ in range(3)]
    pairs = [BatchPair([a, a[:1]], [a[2:]]) for a in rows]
    found = []
    for limit in (6, 2):
        model = make_model()
        settings = {"iterations": 3, **CONFIGS[kind]}
        learned = learn(model, little_memory(model, limit), pairs, halve=halve, **settings)
        found.append(learned.scale_of)
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert "with each micro-batch in 2 parts" in caplog.text
    assert "with each micro-batch in 4 parts" in caplog.text


def test_a_batch_that_cannot_be_cut_is_an_error():
    model = make_model()
    with pytest.raises(GradInitError, match=r"cannot be cut any further.*Tried to allocate 1 TiB"):
        learn(model, little_memory(model, 0), PAIRS, halve=halve)


def test_the_host_waits_for_the_device_once_in_an_iteration(monkeypatch):
    """Every way from a tensor to a number of Python passes one of these."""
    reads = []
    for name in ("tolist", "item", "__float__", "__int__", "__bool__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counted(self, original=original):
            reads.append(original.__name__)
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, counted)
    config = GradInitConfig(eta=0.05, iterations=6)
    model, at = make_model(), []
    with deterministic(model):
        blocks = collect_blocks({"": model}, "fixed")
        note = lambda _: at.append(len(reads))  # noqa: E731
        learn_scales(blocks, loss_of(model), PAIRS, config, on_iteration=note)
    # The last two records come together: the last iteration has no next one to be read with.
    assert [b - a for a, b in itertools.pairwise(at)] == [1, 1, 1, 2, 0]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["tempfile.NamedTemporaryFile", "os.fsync", "os.replace"])
def test_an_error_of_the_disk_is_reported_and_the_earlier_file_stays(tmp_path, monkeypatch, step):
    path = tmp_path / "s.json"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        message = r"cannot write .*s\.json: No space left on device; "
        with pytest.raises(GradInitError, match=message):
            write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_a_disk_that_fails_when_the_state_is_saved(tmp_path, monkeypatch):
    """The state saved before is there to resume from, and the model is as it was."""
    path = tmp_path / "state.json"
    written: list[bytes] = []
    usual = os.replace

    def replacing(source: str, target: Path) -> None:
        if written:
            full()
        usual(source, target)
        written.append(path.read_bytes())

    def run(model) -> Learned:
        return learn(model, loss_of(model), PAIRS, state_file=StateFile(path, interval=1))

    model = make_model()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replacing)
        with pytest.raises(GradInitError, match=r"cannot write .*: No space left"):
            run(model)
    assert all(map(torch.equal, make_model().parameters(), model.parameters()))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == written
    found = run(make_model())
    path.unlink()
    assert found == run(make_model())


@pytest.mark.slow
def test_printing_to_a_full_disk():
    """Also where what is printed is less than a buffer holds."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [BIN / "fairseq-gradinit", "doctor"],
            **{"stdout": full, "stderr": subprocess.PIPE, "text": True, "check": False},
        )
    assert done.returncode == 1
    assert done.stderr == (
        "fairseq-gradinit: cannot write to standard output: No space left on device\n"
    )
