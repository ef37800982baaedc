"""DeepNorm: the constants by depth, how weights are drawn, and the forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import train_here
from scheme_models import build, outputs, wide_weights

from fairseq_gradinit.plugin.schemes.deepnorm import constants


@pytest.mark.parametrize(
    ("layers", "encoder", "decoder"),
    [
        # By hand: 6^4 * 6 = 7776, whose 16th root is 1.75055.
        ((6, 6), (1.41794, 0.49699), (2.05977, 0.34329)),
        # 18^4 * 6 = 629856, whose 16th root is 2.30384.
        ((18, 6), (1.86611, 0.37763), (2.05977, 0.34329)),
        ((12, 0), (2.21336, 0.31947), None),
        ((0, 8), None, (2.0, 0.35355)),
    ],
)
def test_the_constants_of_the_paper(layers, encoder, decoder):
    found = constants(*layers)
    expected = {"encoder": encoder, "decoder": decoder}
    assert found.keys() == {side for side, value in expected.items() if value}
    for side, value in found.items():
        assert (value.alpha, value.beta) == pytest.approx(expected[side], abs=1e-5)


def test_a_layer_weighs_its_shortcuts_by_alpha():
    model = build("transformer_deepnorm", encoder_layers=3, decoder_layers=2)
    x = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(1))
    for side, value in constants(3, 2).items():
        layer, alpha = model.get_submodule(side).layers[1], value.alpha
        h = layer.self_attn_layer_norm(alpha * x + layer.self_attn(x, x, x)[0])
        if side == "decoder":
            h = layer.encoder_attn_layer_norm(alpha * h + layer.encoder_attn(h, x, x)[0])
        expected = layer.final_layer_norm(alpha * h + layer.fc2(torch.relu(layer.fc1(h))))
        found = layer(x, None) if side == "encoder" else layer(x, encoder_out=x)[0]
        torch.testing.assert_close(found, expected)
    model = build("transformer_lm_deepnorm", decoder_layers=8)
    assert model.decoder.layers[0].shortcuts.ffn.item() == 2.0


def test_gains_are_beta_for_values_and_feed_forward_and_1_for_queries_and_keys():
    values = constants(2, 3)
    weights = wide_weights("transformer_deepnorm")
    assert len(weights) == 2 * 6 + 3 * 10
    for name, weight in weights.items():
        gain = 1.0 if ("q_proj" in name or "k_proj" in name) else values[name[:7]].beta
        expected = gain * (2 / sum(weight.shape)) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name


def test_an_error_in_the_middle_of_a_layer_leaves_no_trace():
    model = build("transformer_deepnorm")
    layer = model.decoder.layers[0]
    layer.shortcuts.ffn.fill_(7.0)
    before = outputs(model)
    fc1, layer.fc1 = layer.fc1, None
    with pytest.raises(TypeError):
        outputs(model)
    layer.fc1 = fc1
    assert torch.equal(outputs(model), before)


def test_a_copy_is_independent():
    """fairseq copies models for its moving average."""
    model = build("transformer_deepnorm")
    other = copy.deepcopy(model)
    before = outputs(model)
    for name, buffer in other.named_buffers():
        if "shortcuts" in name:
            buffer.fill_(9.0)
    assert torch.equal(outputs(model), before)
    assert not torch.allclose(outputs(other), before)


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(corpus, tmp_path):
    options = ("--init-scheme", "deepnorm", "--dropout", "0")
    plain = train_here(corpus.translation, tmp_path / "plain", *options)
    saved = train_here(corpus.translation, tmp_path / "saved", *options, "--checkpoint-activations")
    assert saved.code == 0, saved.output
    assert plain.updates == saved.updates
