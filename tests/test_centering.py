"""LayerNorms whose outputs average to zero: what centering comes to, and what it leaves alone."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GRADINIT, train_here
from test_train import STANDSTILL, same, scales_in
from torch import nn

from fairseq_gradinit.centering import center_layer_norms
from fairseq_gradinit.errors import GradInitError

OFF = ["--gradinit-centering", "off"]


class Residual(nn.Module):
    """Two post-LN blocks, used in another order than they are listed in, and norms beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.norm_2 = nn.Linear(6, 6), nn.LayerNorm(6)
        self.first, self.norm_1 = nn.Linear(6, 6), nn.LayerNorm(6)
        self.unused = nn.LayerNorm(6)
        self.without_bias = nn.LayerNorm(6, bias=False)
        self.frozen = nn.LayerNorm(6)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm_1(x + self.first(x).relu())
        x = self.norm_2(x + self.second(x).relu())
        return self.frozen(self.without_bias(x))


@pytest.fixture
def model() -> Residual:
    torch.manual_seed(0)
    return Residual().double()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    # Of different lengths, with a common part.
    return [torch.randn(1, n, 6, generator=rng).double() + 0.5 for n in (3, 7, 5)]


def outputs(model: nn.Module, norm: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = norm.register_forward_hook(lambda _, __, out: found.append(out.flatten(0, -2)))
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.cat(found).detach()


def test_the_outputs_average_to_zero_over_all_tokens(model, batches):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert outputs(model, model.norm_2, batches).mean(0).abs().max() > 0.1
    assert center_layer_norms([model], model, batches) == 2
    for norm in (model.norm_1, model.norm_2):
        assert outputs(model, norm, batches).mean(0).abs().max() < 1e-12
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"norm_1.bias", "norm_2.bias"}


def test_the_biases_before_have_no_influence(model, batches):
    center_layer_norms([model], model, batches)
    once = [model.norm_1.bias.detach().clone(), model.norm_2.bias.detach().clone()]
    with torch.no_grad():
        model.norm_1.bias.add_(3.0)
        model.norm_2.bias.fill_(-1.0)
    center_layer_norms([model], model, batches)
    assert torch.equal(model.norm_1.bias, once[0])
    assert torch.equal(model.norm_2.bias, once[1])


class Twice(nn.Module):
    """A LayerNorm that some batches pass through twice, and others never, before another one."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.LayerNorm(6), nn.LayerNorm(6)
        self.layer, self.end = nn.Linear(6, 6), nn.Linear(6, 6)
        self.ends = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.layer(x)) if x.shape[1] != 5 else x
        x = self.shared(x + self.layer(x).relu()) if x.shape[1] == 7 else x
        x = self.last(x)
        self.ends += 1
        return self.end(x)


def test_each_pass_through_a_norm_counts_and_nothing_after_the_last_one_is_run(batches):
    torch.manual_seed(0)
    model = Twice().double()
    assert center_layer_norms([model], model, batches) == 2
    # Once to see which norms there are, and once for each batch to see how often it meets them.
    assert model.ends == 1 + len(batches)
    for norm in (model.shared, model.last):
        found = norm.bias.detach().clone()
        with torch.no_grad():
            norm.bias.zero_()
            mean = outputs(model, norm, batches).mean(0)
            norm.bias.copy_(-mean)
        torch.testing.assert_close(norm.bias, found, rtol=1e-12, atol=1e-12)


class OneOfTwo:
    """A process of two; to its sums it adds those that the other one is known to have."""

    count = 2

    def __init__(self, rank: int, other: torch.Tensor):
        self.rank, self.other = rank, other

    def sum_(self, tensors):
        (total,) = tensors
        self.own = total.clone()
        total.add_(self.other)


def test_processes_share_the_batches(batches):
    def center(processes=None) -> torch.Tensor:
        norm = nn.LayerNorm(6).double()
        center_layer_norms([norm], norm, batches, processes)
        return norm.bias.detach()

    first = OneOfTwo(0, torch.zeros(7).double())
    center(first)
    assert first.own[-1] == 3 + 5
    second = OneOfTwo(1, first.own)
    torch.testing.assert_close(center(second), center(), rtol=1e-12, atol=1e-12)
    assert second.own[-1] == 7


def test_an_output_that_is_not_finite_is_told(model, batches):
    with torch.no_grad():
        model.first.weight[0, 0] = torch.inf
    with pytest.raises(GradInitError, match="the output of norm_1 is not finite before training"):
        center_layer_norms([model], model, batches)


@pytest.fixture(scope="module")
def centered(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("centered")
    return folder, train_here(corpus.translation, folder, *GRADINIT, *STANDSTILL)


def biases(weights: dict) -> dict:
    return {n: w for n, w in weights.items() if n.endswith("layer_norm.bias")}


def test_a_run_centers_every_layer_norm_before_and_after_learning(centered):
    _, run = centered
    assert run.code == 0, run.output
    assert len(run.lines("centered the outputs of 10 LayerNorms on 32 sentences")) == 2
    assert len(biases(run.first)) == 10
    assert all(bias.any() for bias in biases(run.first).values())
    assert not any(bias.any() for bias in biases(run.initial).values())
    assert "|centering:on|" in run.output


def test_it_can_be_switched_off(corpus, tmp_path):
    run = train_here(corpus.translation, tmp_path, *GRADINIT, *STANDSTILL, *OFF)
    assert run.code == 0, run.output
    assert not any(bias.any() for bias in biases(run.first).values())
    assert "|centering:off|" in run.output
    assert not run.lines("centered the outputs")
    file = ["--gradinit", "--gradinit-scales", tmp_path / "gradinit_scales.json", *STANDSTILL]
    again = train_here(corpus.translation, tmp_path / "again", *file)
    assert same(again.first, run.first)
    asked = train_here(corpus.translation, tmp_path / "asked", *file, "--gradinit-centering", "on")
    assert len(asked.lines("centered the outputs of 10 LayerNorms")) == 1
    assert_saved_scales_give_the_same(asked, corpus, tmp_path / "asked", "on")


def assert_saved_scales_give_the_same(run, corpus, folder, centering: str) -> None:
    path = folder / "gradinit_scales.json"
    assert f"|centering:{centering}|" in json.loads(path.read_text())["signature"]
    file = ["--gradinit", "--gradinit-scales", path, *STANDSTILL]
    again = train_here(corpus.translation, folder / "again", *file)
    assert again.code == 0, again.output
    assert same(again.first, run.first)


def test_scales_that_were_applied_without_centering_are_saved_as_such(centered, corpus, tmp_path):
    folder, _ = centered
    file = ["--gradinit", "--gradinit-scales", folder / "gradinit_scales.json", *STANDSTILL, *OFF]
    run = train_here(corpus.translation, tmp_path, *file)
    assert run.code == 0, run.output
    assert not any(bias.any() for bias in biases(run.first).values())
    assert_saved_scales_give_the_same(run, corpus, tmp_path, "off")


@pytest.mark.parametrize(
    "options", [[], ["--gradinit-preset", "paper", "--gradinit-max-tokens", "900"]], ids=" ".join
)
def test_scales_from_a_file_are_centered_to_the_same_weights(centered, corpus, tmp_path, options):
    folder, run = centered
    file = ["--gradinit", "--gradinit-scales", folder / "gradinit_scales.json", *STANDSTILL]
    again = train_here(corpus.translation, tmp_path, *file, *options)
    assert again.code == 0, again.output
    assert same(again.first, run.first)
    assert scales_in(tmp_path) == scales_in(folder)


def test_gains_of_layer_norms_can_be_learned_beside_it(corpus, tmp_path):
    options = [*GRADINIT, *STANDSTILL, "--gradinit-norm-gains", "learned"]
    run = train_here(corpus.translation, tmp_path, *options)
    assert run.code == 0, run.output
    rows = json.loads((tmp_path / "gradinit_scales.json").read_text())["blocks"]
    states = {
        (row["name"].rpartition(".")[2], row["state"])
        for row in rows
        if "layer_norm" in row["name"]
    }
    assert states == {("weight", "learned"), ("bias", "centered")}
