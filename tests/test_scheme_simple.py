"""Residual branches that start at zero."""

from __future__ import annotations

import pytest
import torch
from scheme_models import build

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.schemes.zero_branches import zero_branches


def test_each_block_is_the_identity_up_to_its_layer_norms():
    model = build("transformer_iwslt_de_en")
    x = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(1))
    before = model.encoder.layers[0](x, None)
    zero_branches(model)
    layer = model.encoder.layers[0]
    expected = layer.final_layer_norm(layer.self_attn_layer_norm(x))
    assert torch.equal(layer(x, None), expected)
    assert not torch.allclose(before, expected)
    layer = model.decoder.layers[1]
    expected = layer.final_layer_norm(layer.encoder_attn_layer_norm(layer.self_attn_layer_norm(x)))
    assert torch.equal(layer(x, encoder_out=x)[0], expected)


def test_only_the_last_layers_of_branches_change():
    model, stock = build("transformer_iwslt_de_en"), build("transformer_iwslt_de_en")
    zero_branches(model)
    last = ("out_proj.weight", "out_proj.bias", "fc2.weight", "fc2.bias")
    for (name, tensor), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(tensor, other) != (name.endswith(last) and bool(other.any())), name
        assert not name.endswith(last) or not tensor.any(), name


def test_a_block_of_a_pre_ln_model_is_the_identity():
    model = build("transformer_iwslt_de_en", encoder_normalize_before=True)
    zero_branches(model)
    x = torch.randn(5, 3, 32)
    assert torch.equal(model.encoder.layers[0](x, None), x)
    with pytest.raises(GradInitError, match="Linear has none: choose another --arch"):
        zero_branches(torch.nn.Linear(2, 2))
