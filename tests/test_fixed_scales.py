"""Scales that are given: encoder branches that start small, key biases that do nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import GRADINIT, SCALES_ALONE, train_here
from scheme_models import build
from test_train import STANDSTILL, same, scales_in
from torch import nn

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.fixed_scales import fixed_scales
from fairseq_gradinit.scales.file import SCALES_FILE, Scales

BRANCHES = {
    f"encoder.layers.0.{name}.weight"
    for name in ("self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
}


def test_branches_get_the_factor_and_other_tensors_are_learned(corpus, tmp_path):
    small, learned, again = (tmp_path / name for name in ("small", "learned", "again"))
    options = ["--gradinit-encoder-branches", "0.1", "--gradinit-centering", "off"]
    run = train_here(corpus.translation, small, *GRADINIT, *STANDSTILL, *options)
    assert run.code == 0, run.output
    scales = Scales.load(small / SCALES_FILE)
    states = {block.name: (block.state, block.scale) for block in scales.blocks}
    assert {name for name, state in states.items() if state == ("fixed", 0.1)} == BRANCHES
    key_biases = [state for name, state in states.items() if name.endswith("k_proj.bias")]
    assert key_biases == [("fixed", 1.0)] * 3
    assert any(state == "learned" and scale != 1.0 for state, scale in states.values())
    for name in BRANCHES:
        assert torch.equal(run.first[name], run.initial[name] * 0.1), name
    assert "|encoder-branches:0.1|" in run.output
    assert len(run.lines("0.1 (fixed)")) == 4
    # On request they are learned; else they are small while other scales are learned.
    train_here(corpus.translation, learned, *GRADINIT, *STANDSTILL, *SCALES_ALONE)
    others = Scales.load(learned / SCALES_FILE)
    assert {b.state for b in others.blocks if b.name in BRANCHES} == {"learned"}
    assert others.history[0].loss != scales.history[0].loss
    # The file brings them to another run.
    applied = ["--gradinit", "--gradinit-scales", small / SCALES_FILE, *STANDSTILL]
    copy = train_here(corpus.translation, again, *applied)
    assert same(copy.first, run.first)
    assert scales_in(again) == scales_in(small)


def test_which_scales_are_given():
    modules = {"": build("transformer_iwslt_de_en")}
    scale_of = fixed_scales(modules, 0.1, required=True, kept=["encoder.layers.0.fc1.weight"])
    assert scale_of("encoder.layers.0.fc1.weight") == 1.0
    assert scale_of("encoder.layers.1.fc1.weight") == 0.1
    assert scale_of("models.de-en.encoder.layers.1.fc2.weight") == 0.1
    assert scale_of("decoder.layers.1.fc1.weight") is None
    modules = {"": nn.ModuleDict({"decoder": nn.Linear(2, 2)})}
    with pytest.raises(GradInitError, match="the model has no encoder layers"):
        fixed_scales(modules, 0.1, required=True)
    assert fixed_scales(modules, 0.1, required=False)("decoder.weight") is None
