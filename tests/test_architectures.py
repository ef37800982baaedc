"""Architectures: stock fairseq's own, post-LN, under a name that stock fairseq knows too."""

from __future__ import annotations

from argparse import Namespace

import pytest

STOCK = {
    "transformer_gradinit_iwslt_de_en": "transformer_iwslt_de_en",
    "transformer_gradinit_wmt_en_de": "transformer_wmt_en_de",
    "transformer_gradinit_wmt_en_de_big": "transformer_wmt_en_de_big",
}


@pytest.fixture(scope="module")
def build():
    """Builds a model of an architecture on a joined dictionary of 96 symbols."""
    from fairseq.data import Dictionary
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

    import fairseq_gradinit.plugin.install  # noqa: F401

    dictionary = Dictionary()
    for i in range(92):
        dictionary.add_symbol(str(i))
    task = Namespace(source_dictionary=dictionary, target_dictionary=dictionary)

    def make(arch, **given):
        # Sizes that shapes depend on stay; depth does not change the kinds of modules.
        args = Namespace(arch=arch, encoder_layers=1, decoder_layers=1, **given)
        ARCH_CONFIG_REGISTRY[arch](args)
        return args, ARCH_MODEL_REGISTRY[arch].build_model(args, task)

    return make


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("ours", STOCK)
def test_modules_and_shapes_are_those_of_the_stock_counterpart(build, ours):
    args, model = build(ours)
    stock_args, stock = build(STOCK[ours])
    assert shapes(model) == shapes(stock)
    assert kinds(model) == kinds(stock)
    ignored = {"arch", "dropout", "attention_dropout", "activation_dropout"}
    if ours != "transformer_gradinit_iwslt_de_en":
        ignored = {"arch"}
    for name in vars(stock_args).keys() - ignored:
        assert getattr(args, name) == getattr(stock_args, name), name


@pytest.mark.parametrize("ours", [*STOCK, "transformer_gradinit_tiny"])
def test_models_are_post_ln_and_named_as_a_stock_model(build, ours):
    args, model = build(ours)
    assert args.arch == "transformer"
    assert not args.encoder_normalize_before
    assert not args.decoder_normalize_before
    assert model.encoder.layer_norm is None
    assert model.decoder.layer_norm is None
    assert not model.encoder.layers[0].normalize_before


def test_the_dropout_of_the_authors(build):
    args, _ = build("transformer_gradinit_iwslt_de_en")
    assert (args.dropout, args.attention_dropout, args.activation_dropout) == (0.3, 0.1, 0.1)


def test_the_tiny_model(build):
    args, model = build("transformer_gradinit_tiny")
    assert shapes(model)["encoder.embed_tokens.weight"] == (96, 256)
    assert model.encoder.embed_tokens is model.decoder.embed_tokens
    assert shapes(model)["decoder.layers.0.fc1.weight"] == (1024, 256)
    assert (args.encoder_attention_heads, args.decoder_attention_heads) == (4, 4)


@pytest.mark.parametrize("ours", [*STOCK, "transformer_gradinit_tiny"])
def test_the_command_line_has_the_last_word(build, ours):
    args, _ = build(ours, dropout=0.7, encoder_ffn_embed_dim=48, decoder_normalize_before=True)
    assert (args.dropout, args.encoder_ffn_embed_dim) == (0.7, 48)
    assert args.decoder_normalize_before is True


def test_the_tiny_model_has_three_layers_unless_told_otherwise():
    from fairseq.models import ARCH_CONFIG_REGISTRY

    import fairseq_gradinit.plugin.install  # noqa: F401

    args = Namespace()
    ARCH_CONFIG_REGISTRY["transformer_gradinit_tiny"](args)
    assert (args.encoder_layers, args.decoder_layers) == (3, 3)
