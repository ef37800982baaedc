"""Batches that cannot be used: not finite, or too large for the memory."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
import torch
from conftest import nearly_full_disk
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
CONFIGS = {
    "objective": {},
    "constraint": {"gamma": 1e-3},
}
# Losses that iterations take of a pair of two micro-batches each, with exact products.
CALLS = {"objective": 4, "constraint": 4}


def learn(model, loss, pairs, **settings) -> Learned:
    named = {name: settings.pop(name, None) for name in ("halve", "state_file", "on_iteration")}
    named = {name: value for name, value in named.items() if value is not None}
    config = GradInitConfig(**{"eta": 0.05, "iterations": 4, "second_order": "exact", **settings})
    with deterministic(model):
        return learn_scales(collect_blocks({"": model}, "fixed"), loss, pairs, config, **named)


def spoiled_at(model, bad_calls, spoil):
    """The loss, spoiled in some of its calls, counted from 0."""
    calls = iter(range(10**6))

    def loss(tokens):
        value, count = loss_of(model)(tokens)
        return (spoil(value, model.out.bias) if next(calls) in bad_calls else value), count

    return loss


def assert_skipped(kind, spoil, iteration, call, caplog) -> None:
    """A batch that one of the losses of an iteration spoils is as if it had not been drawn."""
    kept = PAIRS[:iteration] + PAIRS[iteration + 1 :]
    model = make_model()
    expected = learn(model, loss_of(model), kept, **CONFIGS[kind])
    model = make_model()
    # A bad first batch spares its iteration the rest of its calls.
    loss = spoiled_at(model, {iteration * CALLS[kind] + call}, spoil)
    caplog.clear()
    found = learn(model, loss, PAIRS, **CONFIGS[kind])
    assert found.scale_of == expected.scale_of
    assert found.history == expected.history
    assert found.skipped == 1
    assert len([r for r in caplog.records if "the batch is skipped" in r.message]) == 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_that_is_not_finite_is_skipped(kind, caplog):
    assert_skipped(kind, SPOILERS["nan"], 0, 0, caplog)
    assert_skipped(kind, SPOILERS["gradient"], 2, CALLS[kind] - 1, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_a_batch_may_be_not_finite_anywhere_in_an_iteration(kind, spoil, caplog):
    for iteration in (0, 2):
        for call in range(CALLS[kind]):
            assert_skipped(kind, spoil, iteration, call, caplog)


@pytest.mark.parametrize(
    ("bad", "spoil", "settings", "message"),
    [
        # The fourth iteration and all after it.
        (
            range(12, 1000),
            "nan",
            {"iterations": 9, "max_skipped": 2},
            r"the loss is nan in GradInit iteration 4, and 3 batches are more than may be "
            r"skipped; the scale of \S+ grew most, to 1\.\d+: lower eta",
        ),
        ({5}, "nan", {"max_skipped": 0}, "and 1 batches are more than may be skipped"),
        (range(1000), "infinity", {}, "not one batch could be used: check that the model"),
        # Adam keeps the square: scales would not move, and the state could not be written.
        ((), "nan", {"eta": 1e-200, "max_skipped": 2}, "the gradient of the scales is nan"),
        ((), "nan", {"eta": 1e-300, "max_skipped": 2}, "the gradient of the scales is nan"),
    ],
    ids=["later", "none", "all", "square", "infinite"],
)
def test_too_many_bad_batches_are_an_error(bad, spoil, settings, message, tmp_path):
    model = make_model()
    spoilt, factor = spoiled_at(model, bad, SPOILERS[spoil]), 1.0 if bad else 1e9
    state = StateFile(tmp_path / "state.json", interval=1)

    def loss(tokens):
        value, count = spoilt(tokens)
        return factor * value, count / factor

    with pytest.raises(GradInitError, match=message):
        learn(model, loss, PAIRS, state_file=state, **settings)
    assert all(map(torch.equal, model.parameters(), make_model().parameters()))


class LittleMemory:
    """A loss that fits batches of so many rows, and fails in the backward pass of larger ones."""

    def __init__(self, model, rows: int) -> None:
        self.loss = loss_of(model)
        self.rows = rows
        self.sizes: list[int] = []

    def __call__(self, tokens):
        self.sizes.append(len(tokens))
        value, count = self.loss(tokens)
        if len(tokens) > self.rows:
            value.register_hook(self.fail)
        return value, count

    def fail(self, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.\nmore")


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
        loss = LittleMemory(model, limit)
        settings = {"iterations": 3, **CONFIGS[kind]}
        found.append(learn(model, loss, pairs, halve=halve, **settings).scale_of)
    assert max(loss.sizes[-4:]) <= 2
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert "with each micro-batch in 2 parts" in caplog.text
    assert "with each micro-batch in 4 parts" in caplog.text


@pytest.mark.parametrize("how", [halve, None])
def test_a_batch_that_cannot_be_cut_is_an_error(how):
    model = make_model()
    with pytest.raises(GradInitError, match=r"cannot be cut any further.*Tried to allocate 1 TiB"):
        learn(model, LittleMemory(model, 0), PAIRS, halve=how)


def test_the_host_waits_for_the_device_once_in_an_iteration(monkeypatch):
    """Every way from a tensor to a number of Python passes one of these."""
    reads = []
    for name in ("tolist", "item", "__float__", "__int__", "__bool__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counted(self, original=original):
            reads.append(original.__name__)
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for settings in CONFIGS.values():
        model, at = make_model(), []
        settings = {"on_iteration": lambda _, at=at: at.append(len(reads)), **settings}
        learn(model, loss_of(model), PAIRS, iterations=6, **settings)
        # The last two records come together: the last iteration has no next one to be read with.
        assert [b - a for a, b in itertools.pairwise(at)] == [1, 1, 1, 2, 0]


DISK = {"full": errno.ENOSPC, "failing": errno.EIO}


def failing(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", DISK.values(), ids=DISK)
@pytest.mark.parametrize("step", ["tempfile.NamedTemporaryFile", "os.fsync", "os.replace"])
@pytest.mark.parametrize("stuck", [False, True], ids=["", "stuck"])
def test_an_error_of_the_disk_is_reported_and_the_earlier_file_stays(
    tmp_path, monkeypatch, number, step, stuck
):
    """With a disk that is `stuck`, the temporary file cannot be removed either."""
    path = tmp_path / "s.json"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(step, failing(number))
        if stuck:
            patch.setattr(os, "unlink", failing(number))
        message = rf"cannot write .*s\.json: {os.strerror(number)}; "
        with pytest.raises(GradInitError, match=message):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    if not stuck:
        assert [p.name for p in tmp_path.iterdir()] == ["s.json"]
        with nearly_full_disk(100), pytest.raises(GradInitError, match="File too large"):
            write_atomically(path, "new" * 100)
        assert [p.name for p in tmp_path.iterdir()] == ["s.json"]
    write_atomically(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_disk_that_fails_at_any_saving_of_the_state(tmp_path, monkeypatch, nth):
    """The state saved before is there to resume from, and the model is as it was."""
    path = tmp_path / "state.json"
    written: list[bytes] = []
    usual = os.replace

    def replacing(source: str, target: Path) -> None:
        if len(written) == nth - 1:
            failing(errno.ENOSPC)()
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
    assert [p.read_bytes() for p in tmp_path.iterdir()] == written[-1:]
    found = run(make_model())
    path.unlink()
    assert found == run(make_model())
