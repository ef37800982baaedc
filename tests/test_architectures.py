"""Architectures: stock fairseq's own, post-LN, under a name that stock fairseq knows too."""

from __future__ import annotations

from argparse import Namespace

import pytest
from fairseq.models import ARCH_CONFIG_REGISTRY
from scheme_models import build_from

STOCK = {
    "transformer_gradinit_iwslt_de_en": "transformer_iwslt_de_en",
    "transformer_gradinit_wmt_en_de": "transformer_wmt_en_de",
    "transformer_gradinit_wmt_en_de_big": "transformer_wmt_en_de_big",
}


def build(arch: str):
    # Sizes that shapes depend on stay; depth does not change the kinds of modules.
    args = Namespace(arch=arch, encoder_layers=1, decoder_layers=1)
    return args, build_from(args)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("ours", STOCK)
def test_models_are_post_ln_stock_models_under_a_name_of_fairseq_s(ours):
    args, model = build(ours)
    assert args.arch == "transformer"
    assert (args.encoder_normalize_before, args.decoder_normalize_before) == (False, False)
    stock_args, stock = build(STOCK[ours])
    assert shapes(model) == shapes(stock)
    differ = {n for n, value in vars(stock_args).items() if getattr(args, n) != value}
    # The dropout of the authors.
    expected = {"dropout": 0.3, "attention_dropout": 0.1, "activation_dropout": 0.1}
    assert {n: getattr(args, n) for n in differ - {"arch"}} == (expected if "iwslt" in ours else {})


def test_the_tiny_model_and_that_the_command_line_has_the_last_word():
    args = Namespace(dropout=0.7, decoder_normalize_before=True)
    ARCH_CONFIG_REGISTRY["transformer_gradinit_tiny"](args)
    assert (args.encoder_layers, args.decoder_layers) == (3, 3)
    assert (args.dropout, args.decoder_normalize_before) == (0.7, True)
    _, model = build("transformer_gradinit_tiny")
    assert model.encoder.embed_tokens is model.decoder.embed_tokens
    assert shapes(model)["decoder.layers.0.fc1.weight"] == (1024, 256)
