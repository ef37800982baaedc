"""LayerNorms whose outputs average to zero: what centering changes, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import GRADINIT, train_here
from test_train import STANDSTILL, same, scales_in
from tiny import in_ranks
from torch import nn

from fairseq_gradinit.engine.centering import center_layer_norms, layer_norm_biases
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales.file import SCALES_FILE


class Residual(nn.Module):
    """Two post-LN blocks in another order than they are listed in, and norms beside them.

    Some batches pass through the first block twice, others never.
    """

    def __init__(self) -> None:
        super().__init__()
        self.second, self.norm_2 = nn.Linear(6, 6), nn.LayerNorm(6)
        self.first, self.norm_1 = nn.Linear(6, 6), nn.LayerNorm(6)
        self.unused = nn.LayerNorm(6)
        self.without_bias = nn.LayerNorm(6, bias=False)
        self.frozen = nn.LayerNorm(6).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range({3: 1, 7: 2, 5: 0}[x.shape[1]]):
            x = self.norm_1(x + self.first(x).relu())
        x = self.norm_2(x + self.second(x).relu())
        return self.frozen(self.without_bias(x))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual().double()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    # Of different lengths, with a common part.
    return [torch.randn(1, n, 6, generator=rng).double() + 0.5 for n in (3, 7, 5)]


def mean_output(model: nn.Module, norm: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = norm.register_forward_hook(lambda _, __, out: found.append(out.flatten(0, -2).clone()))
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.cat(found).detach().mean(0)


def test_a_bias_is_minus_the_mean_output_without_it_whatever_it_was(model, batches):
    """Every pass through a LayerNorm counts; nothing else changes."""
    expected = copy.deepcopy(model)
    for norm in (expected.norm_1, expected.norm_2):
        norm.bias.data.zero_()
        norm.bias.data = -mean_output(expected, norm, batches)
        assert norm.bias.abs().max() > 0.01
    assert center_layer_norms([model], model, batches) == 2
    found, wanted = list(model.parameters()), list(expected.parameters())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.norm_1.bias.add_(3.0)
        again.norm_2.bias.fill_(-1.0)
    center_layer_norms([again], again, batches)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_processes_share_the_batches(model, batches):
    """Also more processes than there are batches."""

    def center(processes=None) -> list[torch.Tensor]:
        own = copy.deepcopy(model)
        center_layer_norms([own], own, batches, processes)
        return [bias.detach() for bias in layer_norm_biases([own])]

    first, *others = in_ranks(4, center)
    for other in others:
        assert all(map(torch.equal, first, other))
    torch.testing.assert_close(first, center(), rtol=1e-12, atol=1e-12)


def test_output_that_is_not_finite(model, batches):
    model.first.weight.data[0, 0] = torch.inf
    with pytest.raises(GradInitError, match="the output of norm_1 is not finite before training"):
        center_layer_norms([model], model, batches)


# ---- Runs of fairseq-train.


def biases(weights: dict) -> list[torch.Tensor]:
    return [w for n, w in weights.items() if n.endswith("layer_norm.bias")]


def test_a_run_centers_every_layer_norm_and_so_does_one_with_its_scales(corpus, tmp_path):
    """Unless it is switched off."""
    folder = tmp_path / "centered"
    run = train_here(corpus.translation, folder, *GRADINIT, *STANDSTILL)
    assert len(run.lines("centered the outputs of 5 LayerNorms on 32 sentences")) == 2
    assert len(biases(run.first)) == 5
    assert all(bias.any() for bias in biases(run.first))
    assert "|centering:on|" in run.output
    options = ["--gradinit-preset", "paper", "--gradinit-max-tokens", "900", *STANDSTILL]
    options += ["--gradinit", "--gradinit-scales", folder / SCALES_FILE]
    again = train_here(corpus.translation, tmp_path / "again", *options)
    assert same(again.first, run.first)
    assert scales_in(tmp_path / "again") == scales_in(folder)
    plain = train_here(corpus.translation, tmp_path, *options, "--gradinit-centering", "off")
    assert not any(bias.any() for bias in biases(plain.first))
    assert "|centering:off|" in plain.output
    assert not plain.lines("centered the outputs")
