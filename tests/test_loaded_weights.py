"""Weights that a model loads from files while it is built: GradInit leaves them as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import torch
from conftest import GRADINIT, train_here
from fairseq import utils
from scheme_models import build

from fairseq_gradinit.plugin.loaded_weights import loaded_names, note_loaded_weights
from fairseq_gradinit.scales.file import SCALES_FILE, Scales

EMBEDDING = "encoder.embed_tokens.weight"


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


def test_embeddings_from_a_file_are_kept(corpus, tmp_path):
    """While scales are learned, and by scales from a file, unless they are to be scaled too."""
    vectors = tmp_path / "vectors.txt"
    numbers = " ".join(f"{j / 100:.2f}" for j in range(16))
    vectors.write_text("40 16\n" + "".join(f"w{i} {numbers}\n" for i in range(40)))
    short = ["--encoder-embed-path", vectors, "--max-update", "1", "--no-save"]

    def trained(name, *options):
        run = train_here(corpus.translation, tmp_path / name, *options, *short)
        assert run.code == 0, run.output
        rows = json.loads((tmp_path / name / SCALES_FILE).read_text())["blocks"]
        (row,) = (row for row in rows if row["name"] == EMBEDDING)
        return run, (row["state"], row["scale"])

    run, state = trained("learned", *GRADINIT)
    assert state == ("fixed", 1.0)
    assert torch.equal(run.first[EMBEDDING], run.initial[EMBEDDING])
    assert run.lines("loaded from files, so kept")[0].endswith(f": {EMBEDDING}")
    scales = Scales.load(tmp_path / "learned" / SCALES_FILE)
    doubled = tuple(replace(block, scale=2.0, state="learned") for block in scales.blocks)
    replace(scales, blocks=doubled).save(tmp_path / "fresh.json")
    applied = ["--gradinit", "--gradinit-scales", tmp_path / "fresh.json"]
    run, state = trained("kept", *applied)
    assert state == ("fixed", 1.0)
    assert torch.equal(run.first[EMBEDDING], run.initial[EMBEDDING])
    run, _ = trained("all", *applied, "--gradinit-scale-loaded")
    assert torch.equal(run.first[EMBEDDING], 2 * run.initial[EMBEDDING])
