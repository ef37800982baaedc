"""The record of what GradInit did: norms and residual branches, before and after."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GRADINIT, OWN_USER_DIR, train_here
from scheme_models import build, outputs
from torch import nn

from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.processes import OneProcess
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.branches import take_snapshot
from fairseq_gradinit.scales import effect
from fairseq_gradinit.scales.effect import Change, Effect
from fairseq_gradinit.scales.file import Scales


def shares(model: nn.Module) -> dict[str, float]:
    blocks = collect_blocks({"": model}, "fixed")
    return take_snapshot(model, blocks, lambda _: outputs(model), [None], OneProcess()).shares


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
    found = Effect.load(learned[1] / effect.EFFECT_FILE).shares
    assert [change.name for change in found] == [
        *(f"encoder.layers.0.{branch}" for branch in ("self_attn", "ffn")),
        *(f"decoder.layers.0.{branch}" for branch in ("self_attn", "encoder_attn", "ffn")),
    ]
    for change in found[:2]:
        assert 0 < change.after < change.before / 5 < 1


def test_scales_from_a_file_have_the_same_effect(learned, corpus, tmp_path):
    file = learned[1] / "gradinit_scales.json"
    applied = ["--gradinit", "--gradinit-scales", file, "--max-update", "1", "--no-save"]
    assert train_here(corpus.translation, tmp_path, *applied).code == 0
    expected = Effect.load(learned[1] / effect.EFFECT_FILE)
    assert Effect.load(tmp_path / effect.EFFECT_FILE) == expected


def test_the_share_is_that_of_the_variance():
    model = build("transformer_iwslt_de_en")
    seen = {}
    layer = model.encoder.layers[1]
    layer.fc1.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    layer.fc2.register_forward_hook(lambda _, __, output: seen.update(f=output))
    # A branch that puts out nothing.
    for parameter in model.decoder.layers[0].fc2.parameters():
        nn.init.zeros_(parameter)
    found = shares(model)
    x, f = (seen[name].var(unbiased=False).item() for name in "xf")
    assert found["encoder.layers.1.ffn"] == pytest.approx(f / (x + f), rel=1e-5)
    assert found["decoder.layers.0.ffn"] == 0.0


def test_models_without_known_branches_have_none():
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    blocks = collect_blocks({"": net}, "fixed")
    evaluate = lambda _: net(torch.ones(1, 2))  # noqa: E731
    assert take_snapshot(net, blocks, evaluate, [None], OneProcess()).shares == {}


def test_a_model_of_own_layers_trains_and_its_branches_are_left_open(corpus, tmp_path):
    """Layers that do not add up as fairseq's do."""
    own = ["--arch", "transformer_of_own_layers", *OWN_USER_DIR]
    run = train_here(corpus.translation, tmp_path, *GRADINIT, *own, "--max-update", "1")
    assert run.code == 0, run.output
    found = Effect.load(tmp_path / effect.EFFECT_FILE).shares
    left_open = [change.name for change in found if change.after is None]
    assert left_open == ["encoder.layers.0.self_attn", "encoder.layers.0.ffn"]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "e.json"
    Effect("gradinit:1", (Change("fc.weight", 2.0, 0.5),), ()).save(path)
    damaged = {**json.loads(path.read_text()), "shares": [{"name": "a", "before": 1}]}
    path.write_text(json.dumps(damaged))
    with pytest.raises(GradInitError, match=r"damaged: shares\[0\]: after is missing"):
        Effect.load(path)
