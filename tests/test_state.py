"""A run that was interrupted ends with the scales of an unbroken one, to the last bit."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import loss_of, make_model, make_pair

from fairseq_gradinit.engine.blocks import collect_blocks, fingerprint
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learner import Learned
from fairseq_gradinit.engine.learning import learn_scales
from fairseq_gradinit.engine.state import StateFile
from fairseq_gradinit.errors import GradInitError, GradInitStopped
from fairseq_gradinit.plugin.phase import StopSignals
from fairseq_gradinit.scales import Description

ITERATIONS = 8
PAIRS = [make_pair(seed) for seed in range(ITERATIONS + 2)]
CONFIG = GradInitConfig(eta=0.05, iterations=ITERATIONS, gamma=36.0, norm_gains="learned", seed=4)


def identity_of(config: GradInitConfig, model) -> dict[str, str]:
    weights = fingerprint(collect_blocks({"": model}, "learned"))
    return Description(config, weights, "cpu").identity()


class Killed(Exception):
    pass


def learn(
    path,
    config=CONFIG,
    pairs=PAIRS,
    kill_after=None,
    loss_factor=1.0,
    stop=lambda: False,
    model=None,
    **options,
) -> Learned:
    """Learn scales with a state file; `kill_after` so many iterations."""
    model = model or make_model()

    def loss(tokens):
        value, count = loss_of(model)(tokens)
        # Noise that the state of the random number generators decides.
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return value * loss_factor * (1.0 + 0.01 * noise), count

    def on_iteration(iteration):
        if iteration.index == kill_after:
            raise Killed

    with deterministic(model):
        return learn_scales(
            collect_blocks({"": model}, "learned"),
            loss,
            pairs,
            config,
            on_iteration=on_iteration,
            state_file=path and StateFile(path, identity_of(config, model), **options),
            stop=stop,
        )


@pytest.fixture(scope="module")
def unbroken() -> Learned:
    learned = learn(None)
    assert {iteration.kind for iteration in learned.history} == {"objective", "constraint"}
    return learned


@pytest.mark.parametrize("after", [1, 4, ITERATIONS])
def test_a_run_killed_anywhere_ends_with_the_same_scales(after, tmp_path, unbroken):
    path = tmp_path / "state.json"
    with pytest.raises(Killed):
        learn(path, kill_after=after, interval=3)
    assert learn(path, interval=3) == unbroken


def test_skipped_batches_are_part_of_the_position(tmp_path):
    spoiled = [*PAIRS[:2], replace(PAIRS[2], first=[torch.zeros(1, 1).long()]), *PAIRS[3:]]
    # A row of one token has nothing to predict: 0 / 0.
    config = replace(CONFIG, iterations=ITERATIONS - 1)

    def run(path, **options):
        model = make_model()

        def loss(tokens):
            value, count = loss_of(model)(tokens)
            return (value, count) if count else (model.out.bias.sum() * torch.nan, 1.0)

        with deterministic(model):
            return learn_scales(
                collect_blocks({"": model}, "learned"),
                loss,
                spoiled,
                config,
                state_file=path and StateFile(path, interval=1),
                **options,
            )

    expected = run(None)
    assert expected.skipped == 1
    asked = iter([False] * 4 + [True] * 9)
    with pytest.raises(GradInitStopped):
        run(tmp_path / "state.json", stop=lambda: next(asked))
    assert run(tmp_path / "state.json") == expected


def test_a_finished_run_is_not_done_again(tmp_path, unbroken):
    path = tmp_path / "state.json"
    learn(path)
    seen = []
    model = make_model()
    # One loss, to see that the state is of these data and this model.
    again = learn(path, model=model, stop=lambda: seen.append(1) or False)
    assert again == unbroken
    assert len(seen) == 1, "at the end"
    scaled = dict(model.named_parameters())
    for name, parameter in make_model().named_parameters():
        assert torch.equal(scaled[name], parameter * unbroken.scale_of[name])


def test_a_wish_to_stop_that_comes_in_the_last_iteration_is_heard(tmp_path, unbroken, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "state.json"
    asked = iter([False] * ITERATIONS + [True])
    with pytest.raises(GradInitStopped, match=f"after iteration {ITERATIONS}, the last"):
        learn(path, stop=lambda: next(asked))
    assert learn(path) == unbroken
    assert f"going on after iteration {ITERATIONS} of {ITERATIONS}" in caplog.text


@pytest.fixture
def path(tmp_path):
    """A state file of a run that was killed after five iterations."""
    found = tmp_path / "state.json"
    with pytest.raises(Killed):
        learn(found, kill_after=5, interval=1)
    return found


def edited(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


DAMAGES = {
    "cut short": lambda path: path.write_text(path.read_text()[:-40]),
    "no object": lambda path: path.write_text("[1, 2]"),
    "a later version": lambda path: edited(path, lambda d: d.update(version=9)),
    "a changed scale": lambda path: edited(path, lambda d: d["state"]["scales"].reverse()),
    "a field less": lambda path: edited(path, lambda d: d["state"].pop("moments")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_the_run_starts_over(damage, path, unbroken, caplog):
    damage(path)
    assert learn(path) == unbroken
    assert "learning the scales from scratch: " + str(path) in caplog.text


FOREIGN = {
    "other settings": ({"config": replace(CONFIG, eta=0.06)}, r"eta '0\.05', not 0\.06"),
    "other data": ({"pairs": PAIRS[::-1]}, "other data or another loss"),
    "another loss": ({"loss_factor": 1.1}, "other data or another loss"),
}


@pytest.mark.parametrize(("change", "reason"), FOREIGN.values(), ids=FOREIGN)
def test_the_file_of_another_run_is_named_and_the_run_starts_over(change, reason, path, caplog):
    found = learn(path, **change)
    (warning,) = [record.message for record in caplog.records if "scratch" in record.message]
    assert str(path) in warning
    assert re.search(reason, warning)
    assert found.scale_of == pytest.approx(learn(None, **change).scale_of, rel=1e-3)


def test_a_wish_to_stop_is_granted_after_a_whole_iteration(tmp_path, unbroken):
    path = tmp_path / "state.json"
    asked = iter([False, False, True, True])
    initial = make_model()
    model = make_model()
    with pytest.raises(GradInitStopped, match="stopped after iteration 3"):
        learn(path, stop=lambda: next(asked), interval=100, model=model)
    assert len(json.loads(path.read_text())["state"]["history"]) == 3
    assert all(map(torch.equal, model.parameters(), initial.parameters()))
    assert learn(path) == unbroken


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered_and_the_second_acts(number):
    met = []
    before = signal.signal(number, lambda *_: met.append("usual"))
    try:
        with StopSignals() as signals:
            assert not signals()
            os.kill(os.getpid(), number)
            assert signals()
            assert signals.received == number
            assert met == []
            os.kill(os.getpid(), number)
            assert met == ["usual"]
        with StopSignals():
            pass
        os.kill(os.getpid(), number)
        assert met == ["usual", "usual"]
    finally:
        signal.signal(number, before)


def test_a_state_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(GradInitError, match="cannot write"):
        learn(tmp_path / "no" / "folder" / "state.json", interval=1)
