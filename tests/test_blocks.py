"""Which tensors are blocks, and what becomes of the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fairseq_gradinit.engine.blocks import base_weights, collect_blocks, frozen_names, set_weights
from fairseq_gradinit.errors import GradInitError


class FusedLayerNorm(nn.Module):
    """A normalisation layer that is not one of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.bias = nn.Parameter(torch.full((3,), 0.1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.embed = nn.Embedding(4, 3)
        self.inner = nn.MultiheadAttention(3, 1)
        self.norm = FusedLayerNorm()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.out = nn.Linear(3, 4)
        self.out.weight = self.embed.weight
        nn.init.zeros_(self.out.bias)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def states(modules, norm_gains="fixed"):
    return {block.name: block.state for block in collect_blocks(modules, norm_gains)}


def test_every_trainable_tensor_is_a_block_once(model):
    """Those of a criterion, which may share tensors with the model, too."""
    criterion = nn.Module()
    criterion.own = nn.Linear(2, 2, bias=False)
    criterion.shared = model.embed
    modules = {"": model, "criterion": criterion}
    assert states(modules) == {
        "scalar": "learned",
        "embed.weight": "learned",
        "inner.in_proj_weight": "learned",
        "inner.in_proj_bias": "zero",
        "inner.out_proj.weight": "learned",
        "inner.out_proj.bias": "zero",
        "norm.weight": "norm gain",
        "norm.bias": "norm gain",
        "out.bias": "zero",
        "criterion.own.weight": "learned",
    }
    biases = {block.name for block in collect_blocks(modules, "fixed") if block.is_bias}
    assert biases == {"inner.in_proj_bias", "inner.out_proj.bias", "norm.bias", "out.bias"}
    assert frozen_names(modules) == ["frozen.weight", "frozen.bias"]


def test_weights_are_set_to_scale_times_initial_value(model):
    blocks = collect_blocks({"": model}, "fixed")
    base = base_weights(blocks)
    frozen = model.frozen.weight.clone()
    scales = torch.tensor([2.0, 0.5, 1.5, 1.1], dtype=torch.float64)
    for _ in range(2):
        set_weights(blocks, base, scales)
    expected = iter(scales.float().tolist())
    for block, initial in zip(blocks, base, strict=True):
        factor = next(expected) if block.learned else 1.0
        assert torch.equal(block.parameter, initial * factor)
    assert torch.equal(model.frozen.weight, frozen)


def test_nothing_but_norm_gains_and_zeros_is_an_error():
    norm = nn.LayerNorm(3)
    with pytest.raises(GradInitError, match="every one is frozen, all zero, or a gain"):
        collect_blocks({"": norm}, "fixed")
    assert states({"": norm}, "learned") == {"weight": "learned", "bias": "zero"}


def test_a_tensor_that_is_not_finite_is_named(model):
    with torch.no_grad():
        model.inner.out_proj.weight[0, 0] = torch.nan
    with pytest.raises(GradInitError, match=r"inner\.out_proj\.weight holds NaN or infinity"):
        collect_blocks({"": model}, "fixed")
