"""Scales that are given: encoder branches that start small, key biases that do nothing."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GRADINIT, SCALES_ALONE, train_here
from test_options import refusal
from test_train import STANDSTILL, same, scales_in
from torch import nn

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.fixed_scales import fixed_scales

BRANCHES = {
    f"encoder.layers.0.{name}.weight"
    for name in ("self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
}
SMALL = ["--gradinit-encoder-branches", "0.1", "--gradinit-centering", "off"]


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, train_here(corpus.translation, folder, *GRADINIT, *STANDSTILL, *SMALL)


@pytest.fixture(scope="module")
def learned(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    return folder, train_here(corpus.translation, folder, *GRADINIT, *STANDSTILL, *SCALES_ALONE)


def test_branches_get_the_factor_and_other_tensors_are_learned(small):
    folder, run = small
    assert run.code == 0, run.output
    rows = json.loads((folder / "gradinit_scales.json").read_text())["blocks"]
    assert {row["name"] for row in rows if row["scale"] == 0.1} == BRANCHES
    assert all(row["state"] == "fixed" for row in rows if row["name"] in BRANCHES)
    assert any(row["state"] == "learned" and row["scale"] != 1.0 for row in rows)
    for name in BRANCHES:
        assert torch.equal(run.first[name], run.initial[name] * 0.1), name
    assert "|encoder-branches:0.1|" in run.output
    assert len(run.lines("0.1 (fixed)")) == 4


def test_branches_are_small_while_other_scales_are_learned(small, learned):
    losses = [
        json.loads((folder / "gradinit_scales.json").read_text())["history"][0]["loss"]
        for folder, _ in (small, learned)
    ]
    assert losses[0] != losses[1]


def test_branches_are_learned_on_request(learned):
    folder, run = learned
    assert run.code == 0, run.output
    rows = json.loads((folder / "gradinit_scales.json").read_text())["blocks"]
    assert {row["state"] for row in rows if row["name"] in BRANCHES} == {"learned"}


def test_the_bias_of_the_keys_is_never_learned(small):
    rows = json.loads((small[0] / "gradinit_scales.json").read_text())["blocks"]
    found = [(row["state"], row["scale"]) for row in rows if row["name"].endswith("k_proj.bias")]
    assert found == [("fixed", 1.0)] * 3


def test_the_file_brings_fixed_scales_to_another_run(small, corpus, tmp_path):
    folder, run = small
    options = ["--gradinit", "--gradinit-scales", folder / "gradinit_scales.json", *STANDSTILL]
    again = train_here(corpus.translation, tmp_path, *options)
    assert again.code == 0, again.output
    assert again.lines("nothing was learned, so without effect: --gradinit-eta")
    assert same(again.first, run.first)
    assert scales_in(tmp_path) == scales_in(folder)


def test_branches_asked_for_in_a_model_without_encoder_are_refused():
    modules = {"": nn.ModuleDict({"decoder": nn.Linear(2, 2)})}
    with pytest.raises(GradInitError, match="the model has no encoder layers"):
        fixed_scales(modules, 0.1, required=True)
    assert fixed_scales(modules, 0.1, required=False)("decoder.weight") is None


def test_a_language_model_has_no_branches_by_default(corpus, tmp_path):
    options = ["--task", "language_modeling", "--arch", "transformer_lm", "--max-tokens", "400"]
    options += ["--tokens-per-sample", "32", "--optimizer", "adam", "--lr", "1e-3", "--cpu"]
    options += ["--decoder-embed-dim", "16", "--decoder-layers", "1", "--max-update", "1"]
    run = train_here(corpus.language_model, tmp_path, *GRADINIT, "--no-save", base=options)
    assert run.code == 0, run.output
    assert len(set(scales_in(tmp_path).values())) > 5


@pytest.mark.parametrize("factor", ["0", "inf"])
def test_a_factor_that_is_not_positive_and_finite_is_refused(factor):
    message = "--gradinit-encoder-branches must be a number greater than 0"
    assert message in refusal(f"{SMALL[0]}={factor}")
