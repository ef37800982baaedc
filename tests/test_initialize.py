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
from fairseq_gradinit.engine.batch_pairs import thirds
from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learner import BatchPair, learn_scales
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales.file import Scales

CLASSES = 3


def conv_net(norm: type[nn.Module] = nn.Identity) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        norm(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


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
        scores = self.net(images)
        return {"loss": functional.cross_entropy(scores, labels), "logits": scores}


def mean_loss(model: nn.Module, batch) -> torch.Tensor:
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def loss_in_answer(model: nn.Module, batch) -> torch.Tensor:
    return model(**batch)["loss"]


def tuples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [
        (torch.randn(10, 1, 6, 6, generator=rng), torch.randint(CLASSES, (10,), generator=rng))
        for _ in range(3)
    ]


def dictionaries() -> list[dict[str, torch.Tensor]]:
    return [{"images": images, "labels": labels} for images, labels in tuples()]


NETS = {
    "conv": (conv_net, mean_loss, tuples),
    "batch norm": (partial(conv_net, nn.BatchNorm2d), mean_loss, tuples),
    "residual": (Residual, mean_loss, tuples),
    "lstm": (Recurrent, mean_loss, tuples),
    "dictionaries": (Answering, loss_in_answer, dictionaries),
}


def fresh(make=conv_net) -> nn.Module:
    torch.manual_seed(3)
    return make()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


run = partial(initialize, lr=0.01, iterations=5, progress=False)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("gamma", [math.inf, 1e-3], ids=["objective", "constraint"])
def test_equals_the_engine_on_the_same_pairs_to_the_last_bit(name, gamma):
    make, loss_fn, data = NETS[name]
    pairs = []

    def recorded(batch):
        first, second = thirds(batch)
        pairs.append(BatchPair([first], [second]))
        return first, second

    model = fresh(make)
    result = run(
        model, loss_fn, data(), gamma=gamma, min_scale=0.1, max_scale=9.0, seed=4, split=recorded
    )
    twin = fresh(make)
    config = GradInitConfig(
        eta=0.01,
        iterations=5,
        lr=0.03,
        gamma=gamma,
        min_scale=0.1,
        min_bias_scale=0.1,
        max_scale=9.0,
        norm_gains="learned",
    )
    with deterministic(twin):
        blocks = collect_blocks({"": twin}, "learned")
        learned = learn_scales(blocks, lambda batch: (loss_fn(twin, batch), 1), pairs, config)
    assert len(pairs) == 5
    assert same_weights(model, twin)
    assert not same_weights(model, fresh(make))
    assert result.scales == learned.scale_of
    assert result.history == learned.history
    assert {i.kind for i in result.history} == {"objective" if gamma > 1 else "constraint"}


@pytest.mark.parametrize("name", NETS)
def test_all_but_the_weights_is_as_it_was(name):
    make, loss_fn, data = NETS[name]
    model = fresh(make)
    for module in list(model.modules())[1::2]:
        module.eval()
    head = list(model.parameters())[-1]
    head.grad = torch.ones_like(head)
    before = copy.deepcopy(model)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    result = run(model, loss_fn, DataLoader(data(), batch_size=None, shuffle=True))
    assert states == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
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

    mean, summed = (run(fresh(), loss, tuples()).scales for loss in (mean_loss, sums))
    assert summed == pytest.approx(mean, rel=1e-4)


def test_same_seed_same_bits():
    data = TensorDataset(*(torch.cat(part) for part in zip(*tuples(), strict=True)))

    def weights(seed: int) -> nn.Module:
        model = fresh()
        torch.rand(seed)  # The result does not depend on where the generators are.
        run(model, mean_loss, DataLoader(data, 7, shuffle=True), seed=seed)
        return model

    assert same_weights(weights(1), weights(1))
    assert not same_weights(weights(1), weights(2))


def test_a_short_last_batch_is_left_out():
    whole, short = tuples()[0], tuple(tensor[:2] for tensor in tuples()[1])
    with_it, without = fresh(), fresh()
    run(with_it, mean_loss, [whole, short])
    run(without, mean_loss, [whole])
    assert same_weights(with_it, without)


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
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.02),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, dampening=0.5),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "named": lambda p: torch.optim.Adam(list(zip("abcd", p, strict=True)), lr=0.02),
    "two groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 0.02, "weight_decay": 0.0}, {"params": p[1:], "lr": 0.02}]
    ),
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
        model, mean_loss, tuples(), optimizer, iterations=1, progress=False
    ).learned.settings
    assert not any("momentum_buffer" in state for state in optimizer.state.values())
    model, optimizer = trained()
    before = [p.detach().clone() for p in model.parameters()]
    mean_loss(model, tuples()[0]).backward()
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        direction = p.grad if settings["optimizer"] == "sgd" else p.grad.sign()
        large = p.grad.abs() > 1e-3
        wanted = old - float(settings["eta"]) * direction
        assert torch.allclose(p[large], wanted[large], rtol=1e-3, atol=1e-6)


def test_an_optimizer_is_as_good_as_its_name():
    named, given = fresh(), fresh()
    initialize(named, mean_loss, tuples(), "sgd", lr=0.1, iterations=3, progress=False)
    optimizer = torch.optim.SGD(given.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    initialize(given, mean_loss, tuples(), optimizer, iterations=3, progress=False)
    assert same_weights(named, given)


def test_eta_replaces_the_length_of_the_step():
    by_lr, by_eta = fresh(), fresh()
    run(by_lr, mean_loss, tuples(), lr=0.3)
    run(by_eta, mean_loss, tuples(), eta=0.3)
    assert same_weights(by_lr, by_eta)


CLOSEST = "name the closest with optimizer='adam' or 'sgd' or 'sgd-normalized', and give lr"


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adadelta(p),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
        lambda p: torch.optim.Adam(p, eps=1e-3),
        lambda p: torch.optim.Adam([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}]),
    ],
    ids=["adadelta", "adafactor", "lbfgs", "maximize", "large epsilon", "two rates"],
)
def test_an_optimizer_with_another_first_step_is_not_supported(make):
    model = fresh()
    with pytest.raises(GradInitError, match="the first step of .*" + CLOSEST):
        initialize(model, mean_loss, tuples(), make(list(model.parameters())), progress=False)


def frozen() -> nn.Module:
    return conv_net().requires_grad_(False)


def mixed() -> nn.Module:
    model = conv_net()
    model[0].half()
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda: {"model": frozen()},
            "no parameter tensor that GradInit could scale: every one is frozen",
        ),
        (
            lambda: {"model": mixed()},
            "all be float32, or all float64, .* torch.float16 on cpu, torch.fl",
        ),
        (
            lambda: {"model": conv_net().bfloat16()},
            "they are torch.bfloat16 on cpu: convert the model",
        ),
        (lambda: {"loader": []}, "the loader gives no batch"),
        (lambda: {"loader": iter(tuples())}, "ended after 3 batches and cannot be iterated again"),
        (
            lambda: {"loader": [torch.ones(2, 5)]},
            "fewer than three examples, .*: use a larger batch size",
        ),
        (
            lambda: {"loader": [(torch.ones(4), torch.ones(6))]},
            "first dimension, which has sizes 4, 6",
        ),
        (
            lambda: {"loader": [{"a": torch.ones(6), "n": 6}]},
            "has a value of type int: give split, a function",
        ),
        (
            lambda: {"loader": [(torch.ones(6), torch.tensor(6))]},
            "value of type scalar Tensor: give split",
        ),
        (lambda: {"loader": [()]}, "a batch must consist of a tensor: give split"),
        (lambda: {"loss_fn": lambda m, b: m(b[0])}, r"it returned a Tensor of shape \(6, 3\)"),
        (lambda: {"loss_fn": lambda m, b: (mean_loss(m, b), m(b[0]))}, "it returned a tuple$"),
        (lambda: {"loss_fn": lambda m, b: 1.0}, "it returned a float$"),
        (lambda: {"loss_fn": lambda m, b: mean_loss(m, b).detach()}, "the loss has no gradient"),
        (
            lambda: {"loss_fn": lambda m, b: mean_loss(m, b) * math.nan},
            "the loss is nan in GradInit itera",
        ),
        (lambda: {"optimizer": "adamw"}, "must be one of adam, sgd, sgd-normalized, not 'adamw'"),
        (
            lambda: {"optimizer": torch.optim.Adam},
            "must be one of adam, sgd, sgd-normalized, not <class",
        ),
        (
            lambda: {"optimizer": adam(conv_net()), "lr": None},
            r"not those of the model \(0.weight is miss",
        ),
        (
            lambda: {"optimizer": adam(fresh())},
            "the learning rate is the optimizer's: leave out lr",
        ),
        (lambda: {"lr": 0.0}, "eta must be a number greater than 0"),
        (lambda: {"max_scale": 0.5}, "max-scale must be a finite number of at least 1"),
    ],
)
def test_wrong_input_is_one_clear_sentence(changed, message):
    changes = changed()
    model = changes.pop("model", None) or fresh()
    before = copy.deepcopy(model)
    with pytest.raises(GradInitError, match=message) as error:
        run(model, **{"loss_fn": mean_loss, "loader": tuples(), **changes})
    assert "\n" not in str(error.value)
    assert same_weights(model, before)


def test_the_optimizer_of_a_larger_module_is_not_the_model_s():
    both = nn.ModuleList([fresh(), nn.Linear(2, 2)])
    with pytest.raises(GradInitError, match="some are of another module"):
        initialize(both[0], mean_loss, tuples(), adam(both))


def test_the_scales_file_does_to_another_fresh_model_what_the_call_did(tmp_path, capsys):
    model, file = fresh(), tmp_path / "scales.json"
    result = run(model, mean_loss, tuples())
    result.save(str(file))
    twin = fresh()
    scales = Scales.load(file)
    assert scales == result.learned
    scales.apply(collect_blocks({"": twin}, "learned"))
    assert same_weights(model, twin)

    initial, scaled = tmp_path / "initial.pt", tmp_path / "scaled.pt"
    torch.save(fresh().state_dict(), initial)
    assert main(["apply", str(file), str(initial), "--out", str(scaled)]) == 0
    twin.load_state_dict(torch.load(scaled, weights_only=True))
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_on_a_terminal_unless_switched_off(shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(fresh(), mean_loss, tuples(), progress=shown)
    assert ("GradInit: 100%" in sys.stderr.getvalue()) == shown
    assert ("5/5" in sys.stderr.getvalue()) == shown
    assert ("loss=" in sys.stderr.getvalue()) == shown


def test_does_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert len(run(fresh(), mean_loss, tuples(), progress=True).history) == 5


def test_the_package_and_its_program_do_not_import_torch():
    code = "import fairseq_gradinit.cli.command, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
