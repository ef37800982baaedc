"""One call for any model: `fairseq_gradinit.initialize`."""

from __future__ import annotations

import copy
import math
import random
import re
import subprocess
import sys
from collections import OrderedDict, namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fairseq_gradinit import initialize
from fairseq_gradinit.engine.batch_pairs import BatchPair, thirds
from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learning import learn_scales
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales.file import Scales

CLASSES = 3


def conv_net(norm: type[nn.Module] = nn.Identity) -> nn.Module:
    head = nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, CLASSES)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), *head)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 36))
        self.frozen = nn.Linear(36, 36).requires_grad_(False)
        self.head = nn.Linear(36, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.flatten(1)
        return self.head(self.frozen(x) + self.body(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(images.squeeze(1))[0][:, -1])


class Answering(nn.Module):
    """Takes a dictionary, and returns one with the loss in it, as the models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": functional.cross_entropy(self.net(images), labels)}


def mean_loss(model: nn.Module, batch) -> torch.Tensor:
    if isinstance(batch, dict):
        return model(**batch)["loss"]
    return functional.cross_entropy(model(batch[0]), batch[1])


def batches(kind: type = tuple) -> list:
    rng = torch.Generator().manual_seed(1)
    found = [
        (torch.randn(10, 1, 6, 6, generator=rng), torch.randint(CLASSES, (10,), generator=rng))
        for _ in range(3)
    ]
    if kind is dict:
        return [dict(zip(("images", "labels"), batch, strict=True)) for batch in found]
    return found


NETS = {
    "conv": conv_net,
    "batch norm": partial(conv_net, nn.BatchNorm2d),
    "residual": Residual,
    "lstm": Recurrent,
    "dictionaries": Answering,
}


def data_for(name: str) -> list:
    return batches(dict if name == "dictionaries" else tuple)


def fresh(make=conv_net) -> nn.Module:
    torch.manual_seed(3)
    return make()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


run = partial(initialize, iterations=5)


def trained(data=None, **settings) -> nn.Module:
    model = fresh()
    run(model, mean_loss, data or batches(), **{"lr": 0.01, **settings})
    return model


def trained_by(make, **settings) -> nn.Module:
    model = fresh()
    run(model, mean_loss, batches(), make(model.parameters(), **settings))
    return model


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("gamma", [math.inf, 1e-3], ids=["objective", "constraint"])
def test_equals_the_engine_on_the_same_pairs_to_the_last_bit(name, gamma):
    pairs = []

    def recorded(batch):
        first, second = thirds(batch)
        pairs.append(BatchPair([first], [second]))
        return first, second

    model, twin = fresh(NETS[name]), fresh(NETS[name])
    settings = {"gamma": gamma, "min_scale": 0.1, "max_scale": 9.0}
    result = run(model, mean_loss, data_for(name), lr=0.01, seed=4, split=recorded, **settings)
    settings |= {"iterations": 5, "min_bias_scale": 0.1, "norm_gains": "learned"}
    config = GradInitConfig(eta=0.01, lr=0.03, **settings)
    with deterministic(twin):
        blocks = collect_blocks({"": twin}, "learned")
        learned = learn_scales(blocks, lambda batch: (mean_loss(twin, batch), 1), pairs, config)
    assert len(pairs) == 5
    assert same_weights(model, twin)
    assert not same_weights(model, fresh(NETS[name]))
    assert result.scales == learned.scale_of
    assert result.history == learned.history
    assert {i.kind for i in result.history} == {"objective" if gamma > 1 else "constraint"}


def random_states() -> tuple:
    numbers = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return random.getstate(), *numbers


@pytest.mark.parametrize("name", NETS)
def test_all_but_the_weights_is_as_it_was(name):
    model = fresh(NETS[name])
    for module in list(model.modules())[1::2]:
        module.eval()
    head = list(model.parameters())[-1]
    head.grad = torch.ones_like(head)
    before, states = copy.deepcopy(model), random_states()
    loader = DataLoader(data_for(name), batch_size=None, shuffle=True)
    result = run(model, mean_loss, loader, lr=0.01)
    assert random_states() == states
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert all(map(torch.equal, model.buffers(), before.buffers()))
    for (key, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        assert now.requires_grad == then.requires_grad
        assert torch.equal(now, then * result.scales.get(key, 1.0)), key
        assert (now.grad is None) == (now is not head)
    assert head.grad.eq(1).all()


def test_sum_and_count_is_the_mean():
    def sums(model, batch):
        loss = functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        return loss, torch.tensor(len(batch[1]))

    mean, summed = (run(fresh(), loss, batches(), lr=0.01).scales for loss in (mean_loss, sums))
    assert summed == pytest.approx(mean, rel=1e-4)


def test_settings_that_mean_the_same_give_the_same_weights():
    whole, short = batches()[0], tuple(tensor[:2] for tensor in batches()[1])
    assert same_weights(trained(data=[whole, short]), trained(data=[whole]))
    model = fresh()
    run(model, mean_loss, batches(), torch.optim.Adam(model.parameters(), lr=1.0), lr=0.3)
    assert same_weights(model, trained(lr=0.3))


def test_same_seed_same_bits():
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches(), strict=True)))

    def weights(seed: int) -> nn.Module:
        model = fresh()
        torch.rand(seed)  # The result does not depend on where the generators are.
        run(model, mean_loss, DataLoader(data, 7, shuffle=True), seed=seed)
        return model

    assert same_weights(weights(1), weights(1))
    assert not same_weights(weights(1), weights(2))


def test_thirds_overlap_and_keep_examples_together_in_any_structure():
    Point = namedtuple("Point", "x y")
    rows = torch.arange(11)
    batch = OrderedDict(pair=Point(rows, [rows * 2, None]), more=(rows.view(11, 1),))
    first, second = thirds(batch)
    for half in (first, second):
        assert type(half) is OrderedDict
        x, (y, nothing) = half["pair"]
        assert type(half["pair"]) is Point
        assert len(x) == len(set(x.tolist())) == 6
        assert torch.equal(y, 2 * x)
        assert torch.equal(half["more"][0].flatten(), x)
        assert nothing is None
    assert torch.equal(first["pair"].x[3:], second["pair"].x[:3])
    assert len({*first["pair"].x.tolist(), *second["pair"].x.tolist()}) == 9
    assert len(batch["pair"].x) == 11


@pytest.mark.parametrize(
    ("make", "target", "length"),
    [
        (torch.optim.SGD, "sgd", 0.02),
        (partial(torch.optim.SGD, momentum=0.9), "sgd", 0.02),
        (partial(torch.optim.SGD, momentum=0.9, nesterov=True), "sgd", 0.038),
        (torch.optim.Adam, "adam", 0.02),
        (torch.optim.AdamW, "adam", 0.02),
        (torch.optim.Adamax, "adam", 0.02),
        (torch.optim.Adagrad, "adam", 0.02),
    ],
)
def test_the_trial_step_is_the_first_step_of_the_optimizer(make, target, length):
    model = fresh()
    optimizer = make(model.parameters(), lr=0.02, weight_decay=0.0)
    assert same_weights(trained(optimizer=target, lr=length), trained_by(make, lr=0.02))
    before = [p.detach().clone() for p in model.parameters()]
    mean_loss(model, batches()[0]).backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        large = p.grad.abs() > 1e-3
        wanted = old - length * (p.grad if target == "sgd" else p.grad.sign())
        assert torch.allclose(p[large], wanted[large], rtol=1e-3, atol=1e-6)


adam = torch.optim.Adam
six = torch.ones(6)
WRONG = [
    ({"model": conv_net().requires_grad_(False)}, "could scale: every one is frozen"),
    ({"model": conv_net().bfloat16()}, "they are torch.bfloat16 on cpu: convert the model"),
    ({"loader": iter(batches())}, "instead of a generator, which ends, a list"),
    ({"loader": [torch.ones(2, 5)]}, "no more batches of three examples or more: use a larger"),
    ({"loader": [(torch.ones(4), six)]}, "first dimension, which has one size in all: give split"),
    (
        {"loader": [{"a": six, "n": 6}]},
        "a batch must consist of tensors .*: give split, a function",
    ),
    ({"loss_fn": lambda m, b: m(b[0])}, "loss_fn must return the mean loss as a tensor of shape "),
    ({"loss_fn": lambda m, b: mean_loss(m, b).detach()}, r"of shape \(\) with a gradient"),
    ({"loss_fn": lambda m, b: mean_loss(m, b) * math.nan}, "the loss is nan in GradInit itera"),
    ({"optimizer": "adamw"}, "must be one of adam, sgd, sgd-normalized, not 'adamw'"),
    ({"optimizer": adam(conv_net().parameters())}, r"the optimizer does not train 0\.weight"),
    ({"lr": math.nan}, "eta must be a number greater than 0"),
    ({"gamma": -1.0}, "gamma must be .* or inf to switch the norm constraint off"),
]


def two_rates(parameters):
    first, *others = parameters
    return adam([{"params": [first], "lr": 0.1}, {"params": others}])


@pytest.mark.parametrize("make", [torch.optim.Adadelta, two_rates])
def test_an_optimizer_with_another_first_step_is_not_supported(make):
    with pytest.raises(
        GradInitError, match=r"the first step of .* is not known .*: name the closest with"
    ):
        trained_by(make)


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_wrong_input_is_one_clear_sentence(changes, message):
    usual = {"model": fresh(), "loss_fn": mean_loss, "loader": batches(), "lr": 0.01}
    given = {**usual, **changes}
    before = copy.deepcopy(given["model"])
    with pytest.raises(GradInitError, match=message) as error:
        run(**given)
    assert "\n" not in str(error.value)
    assert same_weights(given["model"], before)


def test_the_scales_file_does_to_another_fresh_model_what_the_call_did(tmp_path):
    model, file = fresh(), tmp_path / "scales.json"
    result = run(model, mean_loss, batches(), lr=0.01)
    result.save(str(file))
    twin = fresh()
    scales = Scales.load(file)
    assert scales == result.learned
    scales.apply(collect_blocks({"": twin}, "learned"))
    assert same_weights(model, twin)


@pytest.mark.slow
def test_the_example_on_the_page_trains_a_net_that_does_not_train_otherwise(
    tmp_path, monkeypatch, capsys
):
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "any-model.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(code, {})
    without, gradinit = re.findall(r"GradInit: .*, test accuracy: (.*)%", capsys.readouterr().out)
    assert float(without) < 20
    assert float(gradinit) > 50
    assert len(Scales.load(tmp_path / "digits_scales.json").blocks) == 38


def test_the_package_and_its_program_do_not_import_torch():
    code = "import fairseq_gradinit.cli.command, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
