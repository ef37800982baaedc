"""One call for any model: `fairseq_gradinit.initialize`."""

from __future__ import annotations

import copy
import io
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
from fairseq_gradinit.cli.command import main
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


run = partial(initialize, iterations=5, progress=False)


def trained(loss=mean_loss, data=None, **settings) -> nn.Module:
    model = fresh()
    run(model, loss, data or batches(), **{"lr": 0.01, **settings})
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
    assert same_weights(trained(lr=0.3), trained(eta=0.3))
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    run(model, mean_loss, batches(), optimizer)
    assert same_weights(model, trained(optimizer="sgd", lr=0.1))


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


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=0.02),
    "adamw": partial(torch.optim.AdamW, lr=0.02, amsgrad=True),
    "adamax": partial(torch.optim.Adamax, lr=0.02),
    "adagrad": partial(torch.optim.Adagrad, lr=0.02),
    "nadam": partial(torch.optim.NAdam, lr=0.02),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.02),
    "rprop": partial(torch.optim.Rprop, lr=0.02),
    "sgd": partial(torch.optim.SGD, lr=0.02),
    "momentum": partial(torch.optim.SGD, lr=0.02, momentum=0.9, dampening=0.5),
    "nesterov": partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True),
    "named": lambda p: torch.optim.Adam(list(zip("abcd", p, strict=True)), lr=0.02),
    "two groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 0.02, "weight_decay": 0.0}, {"params": p[1:], "lr": 0.02}]
    ),
}
adam = torch.optim.Adam
# Whose first step is another.
OTHERS = {
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "lbfgs": torch.optim.LBFGS,
    "maximize": partial(torch.optim.SGD, lr=0.1, maximize=True),
    "large epsilon": partial(adam, eps=1e-3),
    "two rates": lambda p: adam([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trial_step_is_the_first_step_of_the_optimizer(name):
    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = fresh()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        return model, optimizer

    model, optimizer = trained()
    settings = initialize(
        model, mean_loss, batches(), optimizer, iterations=1, progress=False
    ).learned.settings
    assert not any("momentum_buffer" in state for state in optimizer.state.values())
    model, optimizer = trained()
    before = [p.detach().clone() for p in model.parameters()]
    mean_loss(model, batches()[0]).backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        direction = p.grad if settings["optimizer"] == "sgd" else p.grad.sign()
        large = p.grad.abs() > 1e-3
        wanted = old - float(settings["eta"]) * direction
        assert torch.allclose(p[large], wanted[large], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_an_optimizer_with_another_first_step_is_not_supported(make):
    model = fresh()
    message = "the first step of .*name the closest with optimizer='adam' or 'sgd' or 'sgd-norm"
    with pytest.raises(GradInitError, match=message):
        run(model, mean_loss, batches(), make(list(model.parameters())))


def half() -> nn.Module:
    model = conv_net()
    model[0].half()
    return model


BOTH = nn.ModuleList([fresh(), nn.Linear(2, 2)])
six = torch.ones(6)
WRONG = [
    ({"model": conv_net().requires_grad_(False)}, "could scale: every one is frozen"),
    ({"model": half()}, "all be float32, or all float64, .* torch.float16 on cpu, torch.fl"),
    ({"model": conv_net().bfloat16()}, "they are torch.bfloat16 on cpu: convert the model"),
    ({"loader": []}, "the loader gives no batch"),
    ({"loader": iter(batches())}, "ended after 3 batches and cannot be iterated again"),
    ({"loader": [torch.ones(2, 5)]}, "fewer than three examples, .*: use a larger batch size"),
    ({"loader": [(torch.ones(4), six)]}, "first dimension, which has sizes 4, 6"),
    ({"loader": [{"a": six, "n": 6}]}, "has a value of type int: give split, a function"),
    ({"loader": [(six, torch.tensor(6))]}, "value of type scalar Tensor: give split"),
    ({"loader": [()]}, "a batch must consist of a tensor: give split"),
    ({"loss_fn": lambda m, b: m(b[0])}, r"it returned a Tensor of shape \(6, 3\)"),
    ({"loss_fn": lambda m, b: (mean_loss(m, b), m(b[0]))}, "it returned a tuple$"),
    ({"loss_fn": lambda m, b: 1.0}, "it returned a float$"),
    ({"loss_fn": lambda m, b: mean_loss(m, b).detach()}, "the loss has no gradient"),
    ({"loss_fn": lambda m, b: mean_loss(m, b) * math.nan}, "the loss is nan in GradInit itera"),
    ({"optimizer": "adamw"}, "must be one of adam, sgd, sgd-normalized, not 'adamw'"),
    ({"optimizer": adam}, "must be one of adam, sgd, sgd-normalized, not <class"),
    ({"optimizer": adam(conv_net().parameters()), "lr": None}, r"of the model \(0.weight is miss"),
    ({"optimizer": adam(fresh().parameters())}, "is the optimizer's: leave out lr"),
    (
        {"model": BOTH[0], "optimizer": adam(BOTH.parameters()), "lr": None},
        "some are of another module",
    ),
    ({"lr": 0.0}, "eta must be a number greater than 0"),
    ({"max_scale": 0.5}, "max-scale must be a finite number of at least 1"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_wrong_input_is_one_clear_sentence(changes, message):
    usual = {"model": fresh(), "loss_fn": mean_loss, "loader": batches(), "lr": 0.01}
    given = {**usual, **changes}
    before = copy.deepcopy(given["model"])
    with pytest.raises(GradInitError, match=message) as error:
        run(**given)
    assert "\n" not in str(error.value)
    assert same_weights(given["model"], before)


def test_the_scales_file_does_to_another_fresh_model_what_the_call_did(tmp_path, capsys):
    model, file = fresh(), tmp_path / "scales.json"
    result = run(model, mean_loss, batches(), lr=0.01)
    result.save(str(file))
    twin = fresh()
    scales = Scales.load(file)
    assert scales == result.learned
    scales.apply(collect_blocks({"": twin}, "learned"))
    assert same_weights(model, twin)
    assert main(["diff", str(file), str(file)]) == 0
    assert capsys.readouterr().out.endswith("0 of 4 tensors differ\n")


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


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_on_a_terminal_unless_switched_off(shown, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    trained(progress=shown)
    for text in ("GradInit: 100%", "5/5", "loss="):
        assert (text in terminal.getvalue()) == shown


def test_does_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    trained(progress=True)


def test_the_package_and_its_program_do_not_import_torch():
    code = "import fairseq_gradinit.cli.command, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
