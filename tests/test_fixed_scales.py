"""Scales that are given: encoder branches that start small, key biases that do nothing."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GRADINIT, train_here
from test_train import STANDSTILL, same, scales_in

BRANCHES = {
    f"encoder.layers.{layer}.{name}.weight"
    for layer in (0, 1)
    for name in ("self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
}
SMALL = ["--gradinit-encoder-branches", "0.1"]
LEARNED = ["--gradinit-encoder-branches", "1"]


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, train_here(corpus.translation, folder, *GRADINIT, *STANDSTILL, *SMALL)


def test_they_get_the_factor_and_the_others_are_learned(small):
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


def test_they_are_small_while_the_others_are_learned(small, corpus, tmp_path):
    folder, _ = small
    usual = train_here(corpus.translation, tmp_path, *GRADINIT, *STANDSTILL, *LEARNED)
    losses = [
        json.loads((path / "gradinit_scales.json").read_text())["history"][0]["loss"]
        for path in (folder, tmp_path)
    ]
    assert usual.code == 0
    assert losses[0] != losses[1]


def test_they_are_so_by_default(small, corpus, tmp_path):
    assert train_here(corpus.translation, tmp_path, *GRADINIT, *STANDSTILL).code == 0
    assert scales_in(tmp_path) == scales_in(small[0])


def test_they_are_learned_on_request(corpus, tmp_path):
    run = train_here(corpus.translation, tmp_path, *GRADINIT, *STANDSTILL, *LEARNED)
    assert run.code == 0, run.output
    rows = json.loads((tmp_path / "gradinit_scales.json").read_text())["blocks"]
    assert {row["state"] for row in rows if row["name"] in BRANCHES} == {"learned"}


def test_the_bias_of_the_keys_is_never_learned(small):
    rows = json.loads((small[0] / "gradinit_scales.json").read_text())["blocks"]
    found = [(row["state"], row["scale"]) for row in rows if row["name"].endswith("k_proj.bias")]
    assert found == [("fixed", 1.0)] * 6


def test_the_file_brings_them_to_another_run(small, corpus, tmp_path):
    folder, run = small
    options = ["--gradinit", "--gradinit-scales", folder / "gradinit_scales.json", *STANDSTILL]
    again = train_here(corpus.translation, tmp_path, *options)
    assert again.code == 0, again.output
    assert again.lines("nothing was learned, so without effect: --gradinit-eta")
    assert same(again.first, run.first)
    assert scales_in(tmp_path) == scales_in(folder)


@pytest.mark.parametrize("asked", [True, False])
def test_a_model_without_encoder_is_told_so_if_it_was_asked_for(asked, corpus, tmp_path):
    options = ["--task", "language_modeling", "--arch", "transformer_lm", "--max-tokens", "400"]
    options += ["--tokens-per-sample", "32", "--optimizer", "adam", "--lr", "1e-3", "--cpu"]
    options += ["--decoder-embed-dim", "32", "--decoder-layers", "1", "--max-update", "1"]
    given = SMALL if asked else []
    run = train_here(corpus.language_model, tmp_path, *GRADINIT, *given, base=options)
    if asked:
        assert "the model has no encoder layers" in run.error()
    else:
        assert run.code == 0, run.output


@pytest.mark.parametrize("factor", ["0", "-1", "inf", "nan"])
def test_a_factor_that_is_none_is_refused(factor, corpus, tmp_path):
    run = train_here(corpus.translation, tmp_path, *GRADINIT, f"{SMALL[0]}={factor}")
    assert "--gradinit-encoder-branches must be a number greater than 0" in run.error()
