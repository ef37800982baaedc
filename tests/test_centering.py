"""LayerNorms whose outputs average to zero: what centering changes, and what it leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import GRADINIT, Training, train_here
from test_train import STANDSTILL, same, scales_in
from tiny import in_ranks
from torch import nn

from fairseq_gradinit.engine.centering import center_layer_norms, layer_norm_biases
from fairseq_gradinit.engine.processes import OneProcess
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales.file import SCALES_FILE, Scales

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
    handle = norm.register_forward_hook(lambda _, __, out: found.append(out.flatten(0, -2).clone()))
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.cat(found).detach()


def assert_centered_as_by_definition(model, norms, batches, tolerance=1e-12) -> None:
    expected = copy.deepcopy(model)
    for norm in map(expected.get_submodule, norms):
        norm.bias.data.zero_()
        norm.bias.data = -outputs(expected, norm, batches).mean(0)
    assert center_layer_norms([model], model, batches) == len(norms)
    for name in norms:
        found, bias = model.get_submodule(name).bias, expected.get_submodule(name).bias
        assert bias.abs().max() > 0.01
        torch.testing.assert_close(found, bias, rtol=tolerance, atol=tolerance)


def test_outputs_average_to_zero_whatever_the_biases_were(model, batches):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = vars(model.first)["forward"] = lambda x: nn.Linear.forward(model.first, x)
    assert outputs(model, model.norm_2, batches).mean(0).abs().max() > 0.1
    assert center_layer_norms([model], model, batches) == 2
    for norm in (model.norm_1, model.norm_2):
        assert outputs(model, norm, batches).mean(0).abs().max() < 1e-12
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"norm_1.bias", "norm_2.bias"}
    # It has its forward methods back.
    assert [m for m in model.modules() if "forward" in vars(m)] == [model.first]
    assert vars(model.first)["forward"] is own
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.norm_1.bias.add_(3.0)
        again.norm_2.bias.fill_(-1.0)
    center_layer_norms([again], again, batches)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


@pytest.mark.parametrize(("dtype", "tolerance"), [("double", 1e-12), ("float", 1e-6)])
def test_replayed_passes_give_what_plain_ones_give(model, batches, dtype, tolerance):
    model, batches = getattr(model, dtype)(), [getattr(batch, dtype)() for batch in batches]
    assert_centered_as_by_definition(model, ["norm_1", "norm_2"], batches, tolerance)


def test_no_output_is_computed_for_each_layer_norm_again(batches):
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    blocks = [nn.Sequential(Counted(6, 6), nn.LayerNorm(6)) for _ in range(9)]
    model = nn.Sequential(*blocks).double()
    assert center_layer_norms([model], model, batches) == 9
    # To find the LayerNorms, to center them, and to see that it was right.
    assert len(calls) == 9 * (1 + len(batches) + len(batches))


class Twice(nn.Module):
    """A LayerNorm that some batches pass through twice, and others never, before another one."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.LayerNorm(6), nn.LayerNorm(6)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.layer(x)) if x.shape[1] != 5 else x
        x = self.shared(x + self.layer(x).relu()) if x.shape[1] == 7 else x
        return self.last(x)


def test_each_pass_through_a_layer_norm_counts(batches):
    torch.manual_seed(0)
    assert_centered_as_by_definition(Twice().double(), ["shared", "last"], batches)


class Calling(nn.Module):
    """What a module does to its input with what another module has left to it."""

    def __init__(self, seen: list, act) -> None:
        super().__init__()
        self.seen, self.act = seen, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x, self.seen)


def leave(x: torch.Tensor, seen: list) -> torch.Tensor:
    seen[:] = [x.mean(), *seen[1:]]
    return x * 2.0


ACTS = {
    "read": lambda x, seen: x * seen[0].abs(),
    "take": lambda x, seen: x * seen.pop().abs(),
    "in place": lambda x, seen: x.add_(1.0),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_modules_that_cannot_be_replayed_are_centered_all_the_same(act, batches):
    torch.manual_seed(0)
    seen: list = []
    model = nn.Sequential(
        *(nn.Linear(6, 6), Calling(seen, leave), nn.LayerNorm(6)),
        *(Calling(seen, act), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6)),
    ).double()
    assert_centered_as_by_definition(model, ["2", "5", "7"], batches)


@pytest.mark.parametrize("make", [Residual, Twice])
def test_processes_share_the_batches(make, batches):
    """Also more processes than there are batches."""
    torch.manual_seed(0)
    alone = make().double()

    def center(processes) -> list[torch.Tensor]:
        model = copy.deepcopy(alone)
        center_layer_norms([model], model, batches, processes)
        return [bias.detach() for bias in layer_norm_biases([model])]

    first, *others = in_ranks(4, center)
    for other in others:
        assert all(map(torch.equal, first, other))
    torch.testing.assert_close(first, center(OneProcess()), rtol=1e-12, atol=1e-12)


def test_output_that_is_not_finite(model, batches):
    with torch.no_grad():
        model.first.weight[0, 0] = torch.inf
    with pytest.raises(GradInitError, match="the output of norm_1 is not finite before training"):
        center_layer_norms([model], model, batches)


def test_a_module_that_is_called_so_and_has_other_outputs_is_left_alone():
    class LayerNormCell(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x, self.bias.sum()

    cell, norm = LayerNormCell(), nn.LayerNorm(4)
    model = nn.ModuleList([cell, norm])
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert center_layer_norms([model], lambda batch: norm(cell(batch)[0] + 1), [x]) == 1
    assert torch.equal(cell.bias, torch.ones(3))


# ---- Runs of fairseq-train.


@pytest.fixture(scope="module")
def centered(corpus, tmp_path_factory) -> tuple[Path, Training]:
    folder = tmp_path_factory.mktemp("centered")
    return folder, train_here(corpus.translation, folder, *GRADINIT, *STANDSTILL)


def biases(weights: dict) -> list[torch.Tensor]:
    return [w for n, w in weights.items() if n.endswith("layer_norm.bias")]


def test_a_run_centers_every_layer_norm_before_and_after_learning(centered):
    _, run = centered
    assert len(run.lines("centered the outputs of 5 LayerNorms on 32 sentences")) == 2
    assert len(biases(run.first)) == 5
    assert all(bias.any() for bias in biases(run.first))
    assert not any(bias.any() for bias in biases(run.initial))
    assert "|centering:on|" in run.output


def test_scales_from_a_file_are_centered_to_the_same_weights(centered, corpus, tmp_path):
    folder, run = centered
    options = ["--gradinit-preset", "paper", "--gradinit-max-tokens", "900", *STANDSTILL]
    options += ["--gradinit", "--gradinit-scales", folder / SCALES_FILE]
    again = train_here(corpus.translation, tmp_path, *options)
    assert same(again.first, run.first)
    assert scales_in(tmp_path) == scales_in(folder)


def test_centering_can_be_switched_off(corpus, tmp_path):
    run = train_here(corpus.translation, tmp_path, *GRADINIT, *STANDSTILL, *OFF)
    assert not any(bias.any() for bias in biases(run.first))
    assert "|centering:off|" in run.output
    assert not run.lines("centered the outputs")


@pytest.mark.slow
def test_a_scales_file_says_whether_it_was_applied_with_centering(centered, corpus, tmp_path):
    """Learned with it and applied without, and the other way round."""
    plain = train_here(corpus.translation, tmp_path / "plain", *GRADINIT, *STANDSTILL, *OFF)

    def applied(source: Path, name: str, *options: str) -> Training:
        file = ["--gradinit", "--gradinit-scales", source / SCALES_FILE, *STANDSTILL]
        return train_here(corpus.translation, tmp_path / name, *file, *options)

    assert same(applied(tmp_path / "plain", "again").first, plain.first)
    for source, name in ((centered[0], "off"), (tmp_path / "plain", "on")):
        run = applied(source, name, "--gradinit-centering", name)
        assert any(bias.any() for bias in biases(run.first)) == (name == "on")
        assert f"|centering:{name}|" in Scales.load(tmp_path / name / SCALES_FILE).signature
        assert same(applied(tmp_path / name, f"{name} again").first, run.first)


@pytest.mark.slow
def test_gains_of_layer_norms_can_be_learned_beside_centering(corpus, tmp_path):
    options = [*GRADINIT, *STANDSTILL, "--gradinit-norm-gains", "learned"]
    train_here(corpus.translation, tmp_path, *options)
    blocks = Scales.load(tmp_path / SCALES_FILE).blocks
    states = {(b.name.rpartition(".")[2], b.state) for b in blocks if "layer_norm" in b.name}
    assert states == {("weight", "learned"), ("bias", "centered")}
