"""Models whose layers are a user's own: what only describes them must not end a run."""

from __future__ import annotations

import math

import pytest
from conftest import GRADINIT, OWN_USER_DIR, train_here
from scheme_models import build, outputs
from torch import nn

from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.processes import OneProcess
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.branches import take_snapshot
from fairseq_gradinit.plugin.schemes.zero_branches import zero_branches
from fairseq_gradinit.scales.effect import EFFECT_FILE, Effect


class OwnAttention(nn.Module):
    """Attention that has no projections of fairseq's names, and attends to nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, query, *args, **kwargs):
        return self.mix(query), None


def shares(model: nn.Module) -> dict[str, float]:
    blocks = collect_blocks({"": model}, "fixed")
    return take_snapshot(model, blocks, lambda _: outputs(model), [None], OneProcess()).shares


def with_own_attention() -> nn.Module:
    model = build("transformer_iwslt_de_en")
    layer = model.encoder.layers[0]
    layer.self_attn = OwnAttention(layer.embed_dim)
    return model


def test_branches_of_an_own_attention_are_measured():
    found = shares(with_own_attention())
    assert all(0 < share < 1 for share in found.values())
    assert "encoder.layers.0.self_attn" in found


def test_branches_of_a_layer_that_adds_up_in_its_own_way_are_left_out():
    model = build("transformer_iwslt_de_en")
    layer = model.encoder.layers[0]
    # One residual connection around both sublayers.
    layer.forward = lambda x, *args, **kwargs: layer.residual_connection(
        x=layer.fc1(x)[..., :1], residual=x
    )
    found = shares(model)
    left_out = {name for name, share in found.items() if math.isnan(share)}
    assert left_out == {"encoder.layers.0.self_attn", "encoder.layers.0.ffn"}


def test_a_scheme_names_what_it_does_not_find():
    sentence = "--init-scheme .* self_attn.v_proj of TransformerEncoderLayer.* is no linear layer"
    with pytest.raises(GradInitError, match=sentence):
        zero_branches(with_own_attention())


def test_a_model_of_own_layers_trains(corpus, tmp_path):
    own = ["--arch", "transformer_of_own_layers", *OWN_USER_DIR]
    run = train_here(corpus.translation, tmp_path, *GRADINIT, *own, "--max-update", "1")
    assert run.code == 0, run.output
    found = {change.name: change.after for change in Effect.load(tmp_path / EFFECT_FILE).shares}
    left_out = [name for name, after in found.items() if after is None]
    assert left_out == ["encoder.layers.0.self_attn", "encoder.layers.0.ffn"]
    assert run.lines("not in the report")[0].endswith(", ".join(left_out))
