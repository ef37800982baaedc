"""Weights that a model loads from files while it is built: GradInit leaves them as they are."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import GRADINIT, train_here
from fairseq import utils
from scheme_models import build, outputs
from torch import nn

from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.centering import center_layer_norms
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.plugin.fixed_scales import fixed_scales
from fairseq_gradinit.plugin.loaded_weights import loaded_names, note_loaded_weights
from fairseq_gradinit.scales.file import Scales


def names_after(load) -> list[str]:
    """The names found in a model that `load` puts weights into while it is built."""

    def build_model():
        model = build("transformer_iwslt_de_en", share_decoder_input_output_embed=True)
        load(model)
        return model

    task = SimpleNamespace(build_model=build_model)
    note_loaded_weights(task)
    return loaded_names({"": task.build_model()})


def test_tensors_that_are_loaded_while_the_model_is_built_are_found():
    assert names_after(lambda model: None) == []
    encoder = build("transformer_iwslt_de_en").encoder
    names = names_after(lambda model: model.encoder.load_state_dict(encoder.state_dict()))
    assert names == [f"encoder.{name}" for name, _ in encoder.named_parameters()]
    part = {"fc1.weight": torch.zeros(64, 32)}
    names = names_after(lambda model: model.decoder.layers[1].load_state_dict(part, strict=False))
    assert names == ["decoder.layers.1.fc1.weight"]
    # A tied embedding, under both names.
    vectors = {"3": torch.ones(32)}
    names = names_after(
        lambda model: utils.load_embedding(vectors, "0123", model.decoder.embed_tokens)
    )
    assert names == ["decoder.embed_tokens.weight", "decoder.output_projection.weight"]
    task = SimpleNamespace(build_model=lambda: nn.Linear(2, 2))
    note_loaded_weights(task)
    model = task.build_model()
    model.load_state_dict(nn.Linear(2, 2).state_dict())
    assert loaded_names({"": model}) == []


def test_loaded_tensors_keep_scale_1_also_within_the_branches_of_the_encoder():
    modules = {"": build("transformer_iwslt_de_en")}
    fixed = fixed_scales(modules, 0.1, required=False, kept=["encoder.layers.0.fc1.weight"])
    blocks = {block.name: block for block in collect_blocks(modules, "fixed", fixed)}
    assert blocks["encoder.layers.0.fc1.weight"].fixed_scale == 1.0
    assert blocks["encoder.layers.1.fc1.weight"].fixed_scale == 0.1


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Word vectors as fairseq reads them, of width 16."""
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    numbers = " ".join(f"{j / 100:.2f}" for j in range(16))
    path.write_text("40 16\n" + "".join(f"w{i} {numbers}\n" for i in range(40)))
    return path


@pytest.fixture(scope="module")
def pretrained(corpus, vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    return folder, train_here(corpus.translation, folder, *GRADINIT, *short(vectors))


def short(vectors):
    return ["--encoder-embed-path", vectors, "--max-update", "1", "--no-save"]


def state_of_embedding(folder):
    rows = json.loads((folder / "gradinit_scales.json").read_text())["blocks"]
    (row,) = (row for row in rows if row["name"] == "encoder.embed_tokens.weight")
    return row["state"], row["scale"]


def test_embeddings_from_a_file_are_kept(pretrained):
    folder, run = pretrained
    assert run.code == 0, run.output
    assert state_of_embedding(folder) == ("fixed", 1.0)
    name = "encoder.embed_tokens.weight"
    assert torch.equal(run.first[name], run.initial[name])
    assert run.lines("loaded from files, so kept")[0].endswith(f": {name}")


def test_scales_from_a_file_leave_loaded_embeddings_alone(pretrained, corpus, vectors, tmp_path):
    fresh = tmp_path / "fresh.json"
    learned = Scales.load(pretrained[0] / "gradinit_scales.json")
    Scales(
        tuple(type(b)(b.name, b.shape, 2.0, "learned") for b in learned.blocks), learned.settings
    ).save(fresh)
    applied = ["--gradinit", "--gradinit-scales", fresh, *short(vectors)]
    run = train_here(corpus.translation, tmp_path / "kept", *applied)
    assert state_of_embedding(tmp_path / "kept") == ("fixed", 1.0)
    name = "encoder.embed_tokens.weight"
    assert torch.equal(run.first[name], run.initial[name])
    run = train_here(corpus.translation, tmp_path / "all", *applied, "--gradinit-scale-loaded")
    assert torch.equal(run.first[name], 2 * run.initial[name])


def test_layer_norms_that_were_loaded_are_not_centered():
    model = build("transformer_iwslt_de_en")
    kept = model.encoder.layers[0].final_layer_norm.bias
    before = kept.detach().clone()
    with deterministic(model):
        count = center_layer_norms(
            [model], lambda _: outputs(model), [None], chosen=lambda bias: bias is not kept
        )
    assert count == 9
    assert torch.equal(kept, before)
