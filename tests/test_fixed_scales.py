"""Encoder branches that start small: which they are, and what becomes of them."""

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


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, train_here(corpus.translation, folder, *GRADINIT, *STANDSTILL, *SMALL)


def test_they_get_the_factor_and_the_others_are_learned(small):
    folder, run = small
    assert run.code == 0, run.output
    rows = json.loads((folder / "gradinit_scales.json").read_text())["blocks"]
    assert {row["name"] for row in rows if row["state"] == "fixed"} == BRANCHES
    assert {row["scale"] for row in rows if row["state"] == "fixed"} == {0.1}
    assert any(row["state"] == "learned" and row["scale"] != 1.0 for row in rows)
    for name in BRANCHES:
        assert torch.equal(run.first[name], run.initial[name] * 0.1), name
    assert "|encoder-branches:0.1|" in run.output
    assert len(run.lines("0.1 (fixed)")) == 4


def test_they_are_small_while_the_others_are_learned(small, corpus, tmp_path):
    folder, _ = small
    usual = train_here(corpus.translation, tmp_path, *GRADINIT, *STANDSTILL)
    losses = [
        json.loads((path / "gradinit_scales.json").read_text())["history"][0]["loss"]
        for path in (folder, tmp_path)
    ]
    assert usual.code == 0
    assert losses[0] != losses[1]


def test_the_file_brings_them_to_another_run(small, corpus, tmp_path):
    folder, run = small
    options = ["--gradinit", "--gradinit-scales", folder / "gradinit_scales.json", *STANDSTILL]
    again = train_here(corpus.translation, tmp_path, *options)
    assert again.code == 0, again.output
    assert same(again.first, run.first)
    assert scales_in(tmp_path) == scales_in(folder)


def test_a_model_without_encoder_is_told_so(corpus, tmp_path):
    options = ["--task", "language_modeling", "--arch", "transformer_lm", "--max-tokens", "400"]
    options += ["--tokens-per-sample", "32", "--optimizer", "adam", "--lr", "1e-3", "--cpu"]
    options += ["--decoder-embed-dim", "32", "--decoder-layers", "1", "--max-update", "1"]
    run = train_here(corpus.language_model, tmp_path, *GRADINIT, *SMALL, base=options)
    assert "the model has no encoder layers" in run.error()


@pytest.mark.parametrize("factor", ["0", "-1", "inf", "nan"])
def test_a_factor_that_is_none_is_refused(factor, corpus, tmp_path):
    run = train_here(corpus.translation, tmp_path, *GRADINIT, f"{SMALL[0]}={factor}")
    assert "--gradinit-encoder-branches must be a number greater than 0" in run.error()
