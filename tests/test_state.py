"""A run that was interrupted ends with the scales of an unbroken one, to the last bit."""

from __future__ import annotations

import json
import logging
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
from fairseq_gradinit.errors import GradInitStopped
from fairseq_gradinit.plugin.phase import StopSignals
from fairseq_gradinit.scales import Description

ITERATIONS = 8
PAIRS = [make_pair(seed) for seed in range(ITERATIONS + 2)]
CONFIG = GradInitConfig(eta=0.05, iterations=ITERATIONS, gamma=36.0, norm_gains="learned", seed=4)


class Killed(Exception):
    pass


def learn(
    path, config=CONFIG, pairs=PAIRS, kill_after=None, stop=lambda: False, model=None, **options
) -> Learned:
    """Learn scales with a state file; `kill_after` so many iterations."""
    model = model or make_model()

    def loss(tokens):
        value, count = loss_of(model)(tokens)
        if not count:
            return model.out.bias.sum() * torch.nan, 1.0
        # Noise that the state of the random number generators decides.
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return value * (1.0 + 0.01 * noise), count

    def on_iteration(iteration):
        if iteration.index == kill_after:
            raise Killed

    blocks = collect_blocks({"": model}, "learned")
    identity = Description(config, fingerprint(blocks), "cpu").identity()
    file = path and StateFile(path, identity, **options)
    with deterministic(model):
        return learn_scales(
            blocks, loss, pairs, config, on_iteration=on_iteration, state_file=file, stop=stop
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
    # A row of one token has nothing to predict.
    spoiled = [*PAIRS[:2], replace(PAIRS[2], first=[torch.zeros(1, 1).long()]), *PAIRS[3:]]
    path = tmp_path / "state.json"
    expected = learn(None, pairs=spoiled)
    assert expected.skipped == 1
    with pytest.raises(Killed):
        learn(path, pairs=spoiled, kill_after=4, interval=1)
    assert learn(path, pairs=spoiled) == expected


def test_a_finished_run_that_was_asked_to_stop_is_not_done_again(tmp_path, unbroken, caplog):
    """Also if the wish came in the last iteration."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "state.json"
    asked = iter([False] * ITERATIONS + [True, False])
    with pytest.raises(GradInitStopped, match=f"after iteration {ITERATIONS}, the last"):
        learn(path, stop=lambda: next(asked))
    model = make_model()
    assert learn(path, stop=lambda: next(asked), model=model) == unbroken
    assert f"going on after iteration {ITERATIONS} of {ITERATIONS}" in caplog.text
    scaled = dict(model.named_parameters())
    for name, parameter in make_model().named_parameters():
        assert torch.equal(scaled[name], parameter * unbroken.scale_of[name])


def reverse_scales(path) -> None:
    document = json.loads(path.read_text())
    document["state"]["scales"].reverse()
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "change", "reason"),
    [
        (reverse_scales, {}, "damaged: wrong digest"),
        (None, {"config": replace(CONFIG, eta=0.06)}, r"eta '0\.05', not 0\.06"),
        (None, {"pairs": PAIRS[::-1]}, "other data or another loss"),
    ],
    ids=["damaged", "other settings", "other data"],
)
def test_a_file_of_no_use_is_named_and_the_run_starts_over(
    damage, change, reason, tmp_path, caplog
):
    path = tmp_path / "state.json"
    with pytest.raises(Killed):
        learn(path, kill_after=5, interval=1)
    if damage:
        damage(path)
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


def test_the_first_signal_is_remembered_and_the_second_acts():
    met = []
    before = signal.signal(signal.SIGTERM, lambda *_: met.append("usual"))
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals()
            assert met == []
            signal.raise_signal(signal.SIGTERM)
            assert met == ["usual"]
    finally:
        signal.signal(signal.SIGTERM, before)
