"""One call for any model: `fairseq_gradinit.initialize`."""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
from collections import OrderedDict, namedtuple
from functools import partial

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

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
    """Returns a dictionary with the loss in it, as the models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": functional.cross_entropy(self.net(images), labels)}


NETS = {
    "conv": conv_net,
    "batch norm": partial(conv_net, nn.BatchNorm2d),
    "residual": Residual,
    "lstm": Recurrent,
    "dictionaries": Answering,
}


def mean_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(model, Answering):
        return model(**batch)["loss"]
    return functional.cross_entropy(model(batch["images"]), batch["labels"])


RNG = torch.Generator().manual_seed(1)
BATCHES = [
    {
        "images": torch.randn(10, 1, 6, 6, generator=RNG),
        "labels": torch.randint(CLASSES, (10,), generator=RNG),
    }
    for _ in range(3)
]


def fresh(make=conv_net) -> nn.Module:
    torch.manual_seed(3)
    return make()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


run = partial(initialize, iterations=5)
adam = torch.optim.Adam


def trained(data=BATCHES, optimizer="adam", lr=0.01, **settings) -> nn.Module:
    model = fresh()
    if not isinstance(optimizer, str):
        optimizer = optimizer(model.parameters())
    run(model, mean_loss, data, optimizer, lr, **settings)
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
    settings = {"gamma": gamma, "min_scale": 0.1, "max_scale": 9.0, "seed": 4}
    result = run(model, mean_loss, BATCHES, lr=0.01, split=recorded, **settings)
    settings |= {"iterations": 5, "min_bias_scale": 0.1, "norm_gains": "learned"}
    config = GradInitConfig(eta=0.01, lr=0.03, **settings)
    with deterministic(twin):
        blocks = collect_blocks({"": twin}, "learned")
        learned = learn_scales(blocks, lambda batch: (mean_loss(twin, batch), 1), pairs, config)
    assert same_weights(model, twin)
    assert not same_weights(model, fresh(NETS[name]))
    assert (result.scales, result.history) == (learned.scale_of, learned.history)
    assert {i.kind for i in result.history} == {"objective" if gamma > 1 else "constraint"}


@pytest.mark.parametrize("name", NETS)
def test_all_but_the_weights_is_as_it_was(name):
    model = fresh(NETS[name])
    for module in list(model.modules())[1::2]:
        module.eval()
    before, generator = copy.deepcopy(model), torch.get_rng_state()
    result = run(model, mean_loss, DataLoader(BATCHES, batch_size=None, shuffle=True), lr=0.01)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for key, then in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], then * result.scales.get(key, 1)), key
    assert all(p.grad is None for p in model.parameters())


def test_sum_and_count_is_the_mean():
    def sums(model, batch):
        return mean_loss(model, batch) * 6, torch.tensor(6)

    mean, summed = (run(fresh(), loss, BATCHES, lr=0.01).scales for loss in (mean_loss, sums))
    assert summed == pytest.approx(mean, rel=1e-4)


def test_settings_that_mean_the_same_give_the_same_weights():
    whole, short = BATCHES[0], {name: tensor[:2] for name, tensor in BATCHES[1].items()}
    assert same_weights(trained(data=[whole, short]), trained(data=[whole]))
    assert same_weights(trained(optimizer=partial(adam, lr=1.0), lr=0.3), trained(lr=0.3))


def test_same_seed_same_bits():
    def weights(seed: int) -> nn.Module:
        # The result does not depend on where the generators are.
        torch.rand(seed)
        return trained(DataLoader(BATCHES, batch_size=None, shuffle=True), seed=seed)

    assert same_weights(weights(1), weights(1))
    assert not same_weights(weights(1), weights(2))


def test_thirds_overlap_and_keep_examples_together_in_any_structure():
    Point = namedtuple("Point", "x y")
    rows = torch.arange(11)
    batch = OrderedDict(pair=Point(rows, [rows * 2, None]), more=(rows.view(11, 1),))
    first, second = thirds(batch)
    for half in (first, second):
        assert type(half) is OrderedDict
        assert type(half["pair"]) is Point
        x, (y, nothing) = half["pair"]
        assert len(set(x.tolist())) == 6
        assert torch.equal(y, 2 * x)
        assert torch.equal(half["more"][0].flatten(), x)
        assert nothing is None
    assert torch.equal(first["pair"].x[3:], second["pair"].x[:3])
    assert not set(first["pair"].x[:3].tolist()) & set(second["pair"].x.tolist())


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
    by_optimizer = trained(optimizer=partial(make, lr=0.02), lr=None)
    assert same_weights(by_optimizer, trained(optimizer=target, lr=length))
    before = [p.detach().clone() for p in model.parameters()]
    mean_loss(model, BATCHES[0]).backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        large = p.grad.abs() > 1e-3
        wanted = old - length * (p.grad if target == "sgd" else p.grad.sign())
        assert torch.allclose(p[large], wanted[large], rtol=1e-3, atol=1e-6)


NET = conv_net()
WRONG = [
    ({"model": conv_net().requires_grad_(False)}, "could scale: every one is frozen"),
    ({"model": conv_net().bfloat16()}, "they are torch.bfloat16 on cpu: convert the model"),
    ({"loader": iter(BATCHES)}, "instead of a generator, which ends, a list"),
    ({"loader": [{"a": torch.ones(6), "n": 6}]}, "a batch must consist of tensors .*: give split"),
    ({"loss_fn": lambda m, b: mean_loss(m, b).detach()}, r"loss_fn must return .* with a gradient"),
    ({"loss_fn": lambda m, b: mean_loss(m, b) * math.nan}, "the loss is nan in GradInit itera"),
    ({"optimizer": "adamw"}, "must be one of adam, sgd, sgd-normalized, not 'adamw'"),
    ({"optimizer": adam(conv_net().parameters())}, r"the optimizer does not train 0\.weight"),
    (
        {"model": NET, "optimizer": torch.optim.Adadelta(NET.parameters())},
        "the first step of Adadelta, as it is set up, is not known .*: name the closest with",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_wrong_input_is_one_clear_sentence(changes, message):
    given = {"model": fresh(), "loss_fn": mean_loss, "loader": BATCHES, "lr": 0.01, **changes}
    before = copy.deepcopy(given["model"])
    with pytest.raises(GradInitError, match=message) as error:
        run(**given)
    assert "\n" not in str(error.value)
    assert same_weights(given["model"], before)


def test_the_scales_file_does_to_another_fresh_model_what_the_call_did(tmp_path):
    model, file = fresh(), tmp_path / "scales.json"
    result = run(model, mean_loss, BATCHES, lr=0.01)
    result.save(str(file))
    twin, scales = fresh(), Scales.load(file)
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
