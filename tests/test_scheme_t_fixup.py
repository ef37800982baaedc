"""T-Fixup: no LayerNorm, and scales by depth."""

from __future__ import annotations

import pytest
import torch
from scheme_models import WIDE, build, outputs, wide_weights
from torch import nn

from fairseq_gradinit.plugin.schemes.t_fixup import branch_factor, embedding_factor


@pytest.mark.parametrize(
    ("layers", "encoder", "decoder"),
    # By hand: 6^(-1/4) = 0.638943, 54^(-1/4) = 0.368893; 1; 3^(-1/2).
    [(6, 0.428092, 0.368894), (1, 0.67, 0.577350)],
)
def test_the_factors_of_the_paper(layers, encoder, decoder):
    assert branch_factor("encoder", layers) == pytest.approx(encoder, rel=1e-5)
    assert branch_factor("decoder", layers) == pytest.approx(decoder, rel=1e-5)
    assert embedding_factor(layers) == pytest.approx(decoder, rel=1e-5)


@pytest.mark.parametrize("given", [{}, {"encoder_normalize_before": True}])
def test_there_is_no_layer_norm(given):
    model = build("transformer_t_fixup", layernorm_embedding=True, **given)
    assert not [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert not [name for name in model.state_dict() if "norm" in name]
    assert torch.isfinite(outputs(model)).all()


def test_a_layer_adds_its_branches_and_nothing_else():
    layer = build("transformer_t_fixup").encoder.layers[0]
    x = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(1))
    h = x + layer.self_attn(x, x, x)[0]
    torch.testing.assert_close(layer(x, None), h + layer.fc2(torch.relu(layer.fc1(h))))


@pytest.mark.parametrize("shared", [False, True])
def test_weights_are_xaviers_times_the_factors(shared):
    model = build("transformer_t_fixup", **WIDE, share_all_embeddings=shared)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith(".bias"))
    weights = wide_weights("transformer_t_fixup", share_all_embeddings=shared)
    assert len(weights) == 2 * 6 + 3 * 10
    for name, weight in weights.items():
        factor = branch_factor(name[:7], 2 if name.startswith("encoder") else 3)
        if "q_proj" in name or "k_proj" in name:
            factor = 0.5**0.5
        # Of a uniform distribution on [-a, a] with a = sqrt(6 / (fan_in + fan_out)).
        expected = factor * (2 / sum(weight.shape)) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert weight.abs().max().item() <= factor * (6 / sum(weight.shape)) ** 0.5
    for side, layers in (("encoder", 2), ("decoder", 2 if shared else 3)):
        embeddings = model.get_submodule(side).embed_tokens.weight[4:]
        expected = embedding_factor(layers) * 128**-0.5
        assert embeddings.std().item() == pytest.approx(expected, rel=0.05)
