"""LayerNorms whose outputs average to zero: what centering changes, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import GRADINIT, train_here
from test_train import STANDSTILL, same, scales_in
from torch import nn

from fairseq_gradinit.engine.centering import center_layer_norms, layer_norm_biases
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
    handle = norm.register_forward_hook(lambda _, __, out: found.append(out.flatten(0, -2).clone()))
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.cat(found).detach()


def test_outputs_average_to_zero_over_all_tokens(model, batches):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert outputs(model, model.norm_2, batches).mean(0).abs().max() > 0.1
    assert center_layer_norms([model], model, batches) == 2
    for norm in (model.norm_1, model.norm_2):
        assert outputs(model, norm, batches).mean(0).abs().max() < 1e-12
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"norm_1.bias", "norm_2.bias"}


def test_biases_before_have_no_influence(model, batches):
    center_layer_norms([model], model, batches)
    once = [model.norm_1.bias.detach().clone(), model.norm_2.bias.detach().clone()]
    with torch.no_grad():
        model.norm_1.bias.add_(3.0)
        model.norm_2.bias.fill_(-1.0)
    center_layer_norms([model], model, batches)
    assert torch.equal(model.norm_1.bias, once[0])
    assert torch.equal(model.norm_2.bias, once[1])


def sequentially(model: nn.Module, norms: list[nn.LayerNorm], batches: list[torch.Tensor]) -> None:
    """What centering is by definition."""
    for norm in norms:
        norm.bias.data.zero_()
        norm.bias.data = -outputs(model, norm, batches).mean(0)


def assert_centered_as_by_definition(model, norms, batches, tolerance=1e-12) -> None:
    expected = copy.deepcopy(model)
    sequentially(expected, [expected.get_submodule(name) for name in norms], batches)
    assert center_layer_norms([model], model, batches) == len(norms)
    for name in norms:
        found, bias = model.get_submodule(name).bias, expected.get_submodule(name).bias
        assert bias.abs().max() > 0.01
        torch.testing.assert_close(found, bias, rtol=tolerance, atol=tolerance)


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


class Mixing(nn.Module):
    """Leaves what it saw to another module, which needs it after the first LayerNorm."""

    def __init__(self, seen: list) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen[:] = [x.mean(), *self.seen[1:]]
        return x * 2.0


class Reading(Mixing):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.seen[0].abs()


class Taking(Mixing):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.seen.pop().abs()


class InPlace(Mixing):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1.0)


@pytest.mark.parametrize("kind", [Reading, Taking, InPlace])
def test_modules_that_cannot_be_replayed_are_centered_all_the_same(kind, batches):
    torch.manual_seed(0)
    seen = []
    model = nn.Sequential(
        *(nn.Linear(6, 6), Mixing(seen), nn.LayerNorm(6)),
        *(kind(seen), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6)),
    ).double()
    assert_centered_as_by_definition(model, ["2", "5", "7"], batches)


def test_model_has_its_forward_methods_back(model, batches):
    own = vars(model.first)["forward"] = lambda x: nn.Linear.forward(model.first, x)
    center_layer_norms([model], model, batches)
    assert [m for m in model.modules() if "forward" in vars(m)] == [model.first]
    assert vars(model.first)["forward"] is own


class Threads:
    """Processes that are threads of this one."""

    def __init__(self, count: int, rank: int = 0, shared: tuple | None = None) -> None:
        self.count, self.rank = count, rank
        self.barrier, self.given = shared or (threading.Barrier(count, timeout=60), [None] * count)
        self.calls = 0

    def all(self) -> list[Threads]:
        shared = self.barrier, self.given
        return [Threads(self.count, rank, shared) for rank in range(self.count)]

    def _exchange(self, tensor, combine) -> None:
        self.calls += 1
        self.given[self.rank] = tensor.clone()
        self.barrier.wait()
        result = combine(torch.stack(self.given))
        self.barrier.wait()
        tensor.copy_(result)

    def sum_(self, tensors) -> None:
        for tensor in tensors:
            self._exchange(tensor, lambda given: given.sum(0))

    def max_(self, tensor) -> None:
        self._exchange(tensor, lambda given: given.amax(0))


@pytest.mark.parametrize("make", [Residual, Twice])
def test_processes_share_the_batches(make, batches):
    torch.manual_seed(0)
    alone = make().double()

    def center(processes) -> list[torch.Tensor]:
        model = copy.deepcopy(alone)
        center_layer_norms([model], model, batches, processes)
        return [bias.detach() for bias in layer_norm_biases([model])]

    # More than there are batches.
    ranks = Threads(4).all()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(center, ranks))
    assert len({process.calls for process in ranks}) == 1
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    torch.testing.assert_close(found[0], center(None), rtol=1e-12, atol=1e-12)


def test_output_that_is_not_finite(model, batches):
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
    assert len(run.lines("centered the outputs of 5 LayerNorms on 32 sentences")) == 2
    assert len(biases(run.first)) == 5
    assert all(bias.any() for bias in biases(run.first).values())
    assert not any(bias.any() for bias in biases(run.initial).values())
    assert "|centering:on|" in run.output


def test_centering_can_be_switched_off(corpus, tmp_path):
    run = train_here(corpus.translation, tmp_path, *GRADINIT, *STANDSTILL, *OFF)
    assert run.code == 0, run.output
    assert not any(bias.any() for bias in biases(run.first).values())
    assert "|centering:off|" in run.output
    assert not run.lines("centered the outputs")


@pytest.mark.slow
def test_scales_that_were_learned_without_centering(corpus, tmp_path):
    run = train_here(corpus.translation, tmp_path, *GRADINIT, *STANDSTILL, *OFF)
    file = ["--gradinit", "--gradinit-scales", tmp_path / "gradinit_scales.json", *STANDSTILL]
    again = train_here(corpus.translation, tmp_path / "again", *file)
    assert same(again.first, run.first)
    asked = train_here(corpus.translation, tmp_path / "asked", *file, "--gradinit-centering", "on")
    assert len(asked.lines("centered the outputs of 5 LayerNorms")) == 1
    assert_saved_scales_give_the_same(asked, corpus, tmp_path / "asked", "on")


def assert_saved_scales_give_the_same(run, corpus, folder, centering: str) -> None:
    path = folder / "gradinit_scales.json"
    assert f"|centering:{centering}|" in json.loads(path.read_text())["signature"]
    file = ["--gradinit", "--gradinit-scales", path, *STANDSTILL]
    again = train_here(corpus.translation, folder / "again", *file)
    assert again.code == 0, again.output
    assert same(again.first, run.first)


@pytest.mark.slow
def test_scales_that_were_applied_without_centering_are_saved_as_such(centered, corpus, tmp_path):
    folder, _ = centered
    file = ["--gradinit", "--gradinit-scales", folder / "gradinit_scales.json", *STANDSTILL, *OFF]
    run = train_here(corpus.translation, tmp_path, *file)
    assert run.code == 0, run.output
    assert not any(bias.any() for bias in biases(run.first).values())
    assert_saved_scales_give_the_same(run, corpus, tmp_path, "off")


def test_scales_from_a_file_are_centered_to_the_same_weights(centered, corpus, tmp_path):
    folder, run = centered
    options = ["--gradinit-preset", "paper", "--gradinit-max-tokens", "900"]
    file = ["--gradinit", "--gradinit-scales", folder / "gradinit_scales.json", *STANDSTILL]
    again = train_here(corpus.translation, tmp_path, *file, *options)
    assert again.code == 0, again.output
    assert same(again.first, run.first)
    assert scales_in(tmp_path) == scales_in(folder)


@pytest.mark.slow
def test_gains_of_layer_norms_can_be_learned_beside_centering(corpus, tmp_path):
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
