"""Each initialisation of `--init-scheme` has the property that its paper defines it by."""

from __future__ import annotations

import copy
from itertools import accumulate

import pytest
import torch
from conftest import train_here
from scheme_models import WIDE, build, outputs, wide_weights
from tiny import in_ranks
from torch import nn

from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.processes import OneProcess, Processes
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.branches import Branch, stacks, variances
from fairseq_gradinit.plugin.schemes.admin import set_omegas
from fairseq_gradinit.plugin.schemes.deepnorm import constants
from fairseq_gradinit.plugin.schemes.zero_branches import zero_branches

X = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(1))


# ---- Zero branches


def test_each_block_with_zero_branches_is_the_identity_up_to_its_layer_norms():
    model = build("transformer_iwslt_de_en")
    zero_branches(model)
    layer = model.encoder.layers[0]
    assert torch.equal(layer(X, None), layer.final_layer_norm(layer.self_attn_layer_norm(X)))
    layer = model.decoder.layers[1]
    expected = layer.final_layer_norm(layer.encoder_attn_layer_norm(layer.self_attn_layer_norm(X)))
    assert torch.equal(layer(X, encoder_out=X)[0], expected)
    model = build("transformer_iwslt_de_en", encoder_normalize_before=True)
    zero_branches(model)
    assert torch.equal(model.encoder.layers[0](X, None), X)


def test_zero_branches_change_only_the_last_layers_of_branches():
    model, stock = build("transformer_iwslt_de_en"), build("transformer_iwslt_de_en")
    zero_branches(model)
    last = ("out_proj.weight", "out_proj.bias", "fc2.weight", "fc2.bias")
    for (name, tensor), other in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(tensor, torch.zeros(()) * other if name.endswith(last) else other), name


def test_a_model_without_transformer_layers_is_refused():
    with pytest.raises(GradInitError, match="Linear has none: choose another --arch"):
        zero_branches(nn.Linear(2, 2))


# ---- DeepNorm


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
def test_the_constants_of_deepnorm(layers, encoder, decoder):
    expected = {"encoder": encoder, "decoder": decoder}
    expected = {side: pytest.approx(v, abs=1e-5) for side, v in expected.items() if v}
    assert constants(*layers) == expected


def test_a_layer_of_deepnorm_weighs_its_shortcuts_by_alpha():
    model = build("transformer_deepnorm", encoder_layers=3, decoder_layers=2)
    for side, (alpha, _) in constants(3, 2).items():
        layer = model.get_submodule(side).layers[1]
        h = layer.self_attn_layer_norm(alpha * X + layer.self_attn(X, X, X)[0])
        if side == "decoder":
            h = layer.encoder_attn_layer_norm(alpha * h + layer.encoder_attn(h, X, X)[0])
        expected = layer.final_layer_norm(alpha * h + layer.fc2(torch.relu(layer.fc1(h))))
        found = layer(X, None) if side == "encoder" else layer(X, encoder_out=X)[0]
        torch.testing.assert_close(found, expected)
    model = build("transformer_lm_deepnorm", decoder_layers=8)
    assert model.decoder.layers[0].shortcuts.ffn.item() == 2.0


def test_gains_of_deepnorm_are_beta_for_values_and_feed_forward_and_1_for_queries_and_keys():
    values = constants(2, 3)
    for name, weight in wide_weights("transformer_deepnorm").items():
        gain = 1.0 if ("q_proj" in name or "k_proj" in name) else values[name[:7]][1]
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
    for buffer in other.decoder.layers[0].shortcuts.buffers():
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


# ---- T-Fixup


@pytest.mark.parametrize("pre_ln", [False, True])
def test_t_fixup_has_no_layer_norm(pre_ln):
    model = build("transformer_t_fixup", layernorm_embedding=True, encoder_normalize_before=pre_ln)
    assert not [name for name in model.state_dict() if "norm" in name]
    layer = model.encoder.layers[0]
    h = X + layer.self_attn(X, X, X)[0]
    torch.testing.assert_close(layer(X, None), h + layer.fc2(torch.relu(layer.fc1(h))))


@pytest.mark.parametrize("shared", [False, True])
def test_weights_of_t_fixup_are_xaviers_times_the_factors(shared):
    model = build("transformer_t_fixup", **WIDE, share_all_embeddings=shared)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith(".bias"))
    for name, weight in wide_weights("transformer_t_fixup", share_all_embeddings=shared).items():
        # By hand: 0.67 * 2^(-1/4) for the 2 layers of the encoder, 27^(-1/4) for 3 of the decoder.
        factor = 0.563401 if name.startswith("encoder") else 0.438691
        if "q_proj" in name or "k_proj" in name:
            factor = 0.5**0.5
        # Of a uniform distribution on [-a, a] with a = sqrt(6 / (fan_in + fan_out)).
        expected = factor * (2 / sum(weight.shape)) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
        largest = factor * (6 / sum(weight.shape)) ** 0.5
        assert weight.abs().max().item() == pytest.approx(largest, rel=1e-3)
    # 18^(-1/4) and 27^(-1/4).
    for side, factor in (("encoder", 0.485492), ("decoder", 0.485492 if shared else 0.438691)):
        embeddings = model.get_submodule(side).embed_tokens.weight[4:]
        expected = factor * 128**-0.5
        assert embeddings.std().item() == pytest.approx(expected, rel=0.05)


# ---- Admin


def loud(model: nn.Module) -> nn.Module:
    """Branches of a size that matters, different in every layer."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for stack in stacks(model):
            for branch in stack.branches:
                for linear in branch.values:
                    nn.init.xavier_normal_(linear.weight, generator=rng)
                    linear.weight.mul_(2.0 * (0.5 + torch.rand((), generator=rng)))
    return model


def spread(model: nn.Module, branch: Branch) -> tuple[float, float]:
    (found,) = variances([branch], lambda _: outputs(model), [None], OneProcess())
    return found


def test_omegas_add_up_the_variances_of_what_came_before():
    model = loud(build("transformer_admin"))
    found = set_omegas(model, lambda _: outputs(model), [None], OneProcess())
    for stack in stacks(model):
        parts = [spread(model, branch) for branch in stack.branches]
        totals = list(accumulate([parts[0][0], *(output for _, output in parts)]))
        expected = [1.0, *(total**0.5 for total in totals[1:-1])]
        assert found[stack.side] == pytest.approx(expected, rel=1e-5)
        stored = [getattr(b.layer.shortcuts, b.name).tolist() for b in stack.branches]
        assert stored == [[pytest.approx(omega)] * 32 for omega in expected]


def test_ranks_with_shares_of_different_sizes_measure_what_one_process_does():
    def work(processes: Processes) -> dict[str, list[float]]:
        model = loud(build("transformer_admin"))

        def evaluate(row: int) -> None:
            tokens = 4 + (row * 7 + torch.arange(7)[None]) % 90
            model(tokens, torch.full((1,), 7), tokens)

        with deterministic(model):
            return set_omegas(model, evaluate, range(5), processes)

    together = in_ranks(2, work)
    assert together[0] == together[1]
    for side, omegas in work(OneProcess()).items():
        assert together[0][side] == pytest.approx(omegas, rel=1e-6)


def test_too_few_data_for_admin_are_refused(corpus, tmp_path):
    done = train_here(
        corpus.translation, tmp_path, "--init-scheme", "admin", "--max-tokens", "100000"
    )
    assert done.error().startswith("--init-scheme admin draws sentences by index")
