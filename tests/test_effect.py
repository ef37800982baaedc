"""The record of what GradInit did: norms and residual branches, before and after."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import GRADINIT, train_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheme_models import build, outputs
from torch import nn

from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.processes import OneProcess
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.branches import take_snapshot
from fairseq_gradinit.scales import effect
from fairseq_gradinit.scales.effect import Change, Effect, Snapshot, effect_between
from fairseq_gradinit.scales.file import Scales

EFFECT = Effect(
    "gradinit:1",
    (Change("fc.weight", 2.0, 0.5), Change("fc.bias", 0.0, None)),
    (Change("encoder.layers.0.ffn", 0.5, 0.01),),
)


def snapshot(model: nn.Module, batches: tuple[None, ...] = (None,)) -> Snapshot:
    blocks = collect_blocks({"": model}, "fixed")
    return take_snapshot(model, blocks, lambda _: outputs(model), batches, OneProcess())


@pytest.fixture(scope="module")
def learned(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    run = train_here(corpus.translation, folder, *GRADINIT, "--max-update", "1", "--no-save")
    assert run.code == 0, run.output
    return run, folder


def test_norms_are_those_of_the_weights(learned):
    run, folder = learned
    found = Effect.load(folder / effect.EFFECT_FILE)
    names = [block.name for block in Scales.load(folder / "gradinit_scales.json").blocks]
    assert [change.name for change in found.norms] == names
    for change in found.norms:
        assert change.before == pytest.approx(run.initial[change.name].norm().item(), rel=1e-6)
        assert change.after == pytest.approx(run.first[change.name].norm().item(), rel=1e-6)


def test_branches_of_the_encoder_are_small_afterwards(learned):
    shares = Effect.load(learned[1] / effect.EFFECT_FILE).shares
    assert [change.name for change in shares] == [
        *(f"encoder.layers.0.{branch}" for branch in ("self_attn", "ffn")),
        *(f"decoder.layers.0.{branch}" for branch in ("self_attn", "encoder_attn", "ffn")),
    ]
    for change in shares[:2]:
        assert 0 < change.after < change.before / 5 < 1


def test_scales_from_a_file_have_the_same_effect(learned, corpus, tmp_path):
    file = learned[1] / "gradinit_scales.json"
    applied = ["--gradinit", "--gradinit-scales", file, "--max-update", "1", "--no-save"]
    assert train_here(corpus.translation, tmp_path, *applied).code == 0
    assert Effect.load(tmp_path / effect.EFFECT_FILE) == Effect.load(
        learned[1] / effect.EFFECT_FILE
    )


def test_the_share_is_that_of_the_variance():
    model = build("transformer_iwslt_de_en")
    seen = {}
    layer = model.encoder.layers[1]
    layer.fc1.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    layer.fc2.register_forward_hook(lambda _, __, output: seen.update(f=output))
    found = snapshot(model).shares["encoder.layers.1.ffn"]
    x, f = (seen[name].var(unbiased=False).item() for name in "xf")
    assert found == pytest.approx(f / (x + f), rel=1e-5)


def test_a_branch_that_puts_out_nothing_has_no_share():
    model = build("transformer_iwslt_de_en")
    for parameter in model.decoder.layers[0].fc2.parameters():
        nn.init.zeros_(parameter)
    assert snapshot(model).shares["decoder.layers.0.ffn"] == 0.0


def test_models_without_known_branches_and_data_have_none():
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    blocks = collect_blocks({"": net}, "fixed")
    evaluate = lambda _: net(torch.ones(1, 2))  # noqa: E731
    assert take_snapshot(net, blocks, evaluate, [None], OneProcess()).shares == {}
    assert snapshot(build("transformer_iwslt_de_en"), batches=()).shares == {}


def test_values_that_are_not_finite_are_left_open():
    found = effect_between(
        Snapshot({"w": 1.0}, {"b": math.nan}), Snapshot({"w": math.inf}, {"b": 0.5}), "s"
    )
    assert found == Effect("s", (Change("w", 1.0, None),), (Change("b", None, 0.5),))


names = st.text(max_size=9)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
changes = st.lists(st.builds(Change, names, numbers, numbers), max_size=3).map(tuple)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.builds(Effect, names, changes, changes))
def test_round_trip(tmp_path, found):
    found.save(tmp_path / "e.json")
    assert Effect.load(tmp_path / "e.json") == found


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other"}, "does not hold what GradInit did"),
        ({"version": 2}, "has version 2 of its format"),
        ({"version": True}, "has version True of its format"),
        ({"norms": "none"}, r"is damaged: norms: 'none' is not an array"),
        ({"shares": [{"name": "a", "before": 1}]}, r"damaged: shares\[0\]: after is missing"),
        ({"shares": [{"name": "a", "before": 1, "after": "b"}]}, r"shares\[0\].after"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, sentence):
    path = tmp_path / "e.json"
    EFFECT.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(GradInitError, match=sentence):
        Effect.load(path)
