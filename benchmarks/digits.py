"""GradInit on real images: scikit-learn's handwritten digits, three convolutional nets.

    python benchmarks/digits.py             19 minutes on one core; writes digits.json, digits.png
    python benchmarks/digits.py --table     the tables of what is kept

A plain net of 18 convolutions without normalisation, a residual net of 15 blocks without it, and
the same residual net with batch normalisation. Each is trained by SGD with momentum and by Adam,
from PyTorch's default initialisation and the nets without normalisation also from Kaiming's,
with GradInit before training and without. Runs of one seed share weights, batches and number of
updates, and both sides are judged at the learning rate, of the same few, that suits them best.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import chain, islice, product
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import RESULTS, Table, markdown, read, write
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from fairseq_gradinit.engine import (
    BatchPair,
    GradInitConfig,
    collect_blocks,
    deterministic,
    learn_scales,
)
from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.results.tables import by, spread

TEST_IMAGES = 450
BATCH = 64
CLASSES = 10
WIDTHS = (16, 32, 32)
"""Channels at 8x8, 4x4 and 2x2 pixels."""
AVERAGED = 7
"""Batches that a point of a loss curve is the mean of: a third of an epoch."""


@dataclass(frozen=True)
class Effort:
    """How much is run.

    Attributes:
        train_images: how many of the training images are used; None is all of them.
        iterations: of GradInit.
        rates: the learning rates that every setting is tried with.
    """

    seeds: int
    epochs: int
    iterations: int
    rates: Mapping[str, Sequence[float]]
    train_images: int | None = None


FULL = Effort(
    seeds=5, epochs=6, iterations=100, rates={"SGD": (0.01, 0.03, 0.1), "Adam": (0.001, 0.003)}
)


@dataclass(frozen=True)
class Run:
    """One training run, and what came of it.

    Losses are mean cross entropies in nats, None once not finite.

    Attributes:
        weights: digest of the weights before GradInit and training.
        curve: losses of the batches, each the mean of `AVERAGED`.
        start_loss, first_epoch_loss, last_loss: on all training images, before the first update,
            after one epoch, and after the last.
        accuracy: on the test images, after the last epoch.
        learning: of GradInit: `objective` and `constraint` iterations, processor time in `updates`
            of the same net, `min_scale` and `max_scale` at the end.
    """

    optimizer: str
    net: str
    start: str
    rate: float
    seed: int
    gradinit: bool
    epochs: int
    weights: str = ""
    curve: Sequence[float] = ()
    start_loss: float | None = None
    first_epoch_loss: float | None = None
    last_loss: float | None = None
    accuracy: float = 0.0
    learning: Mapping[str, float] | None = None

    @property
    def setting(self) -> tuple[str, str, str]:
        """A row of the tables."""
        return self.optimizer, self.net, self.start


@dataclass(frozen=True)
class Digits:
    """Images of shape (n, 1, 8, 8), standardised by the training images, and their classes."""

    images: Tensor
    classes: Tensor
    test_images: Tensor
    test_classes: Tensor

    @property
    def updates_per_epoch(self) -> int:
        return len(self.classes) // BATCH


@cache
def digits(train_images: int | None = None) -> Digits:
    data = load_digits()
    split = train_test_split(
        data.images, data.target, test_size=TEST_IMAGES, stratify=data.target, random_state=0
    )
    train, test = (torch.tensor(part, dtype=torch.float32).unsqueeze(1) for part in split[:2])
    mean, deviation = train.mean(), train.std()
    classes, test_classes = map(torch.tensor, split[2:])
    return Digits(
        (train[:train_images] - mean) / deviation,
        classes[:train_images],
        (test - mean) / deviation,
        test_classes,
    )


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + body(x)), as in He et al. 2016, with or without batch normalisation."""

    def __init__(self, channels: int, out: int, stride: int, normalised: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if normalised else nn.Identity
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=not normalised),
            norm(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=not normalised),
            norm(out),
        )
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.shortcut(images) + self.body(images))


def plain_net() -> list[nn.Module]:
    """18 convolutions; VGG's recipe without normalisation."""
    layers: list[nn.Module] = []
    channels = 1
    for stage, width in enumerate(WIDTHS):
        layers += [nn.MaxPool2d(2)] if stage else []
        for _ in range(6):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return layers


def residual_net(normalised: bool) -> list[nn.Module]:
    """A convolution and 15 residual blocks."""
    channels = WIDTHS[0]
    layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()]
    for stage, width in enumerate(WIDTHS):
        for block in range(5):
            stride = 2 if stage and not block else 1
            layers.append(ResidualBlock(channels, width, stride, normalised))
            channels = width
    return layers


NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "plain": plain_net,
    "residual": partial(residual_net, normalised=False),
    "residual, BatchNorm": partial(residual_net, normalised=True),
}
UNNORMALISED = ("plain", "residual")


def settings() -> list[tuple[str, str, str]]:
    return [
        (optimizer, net, start)
        for optimizer, net, start in product(("SGD", "Adam"), NETS, ("default", "Kaiming"))
        if start == "default" or net in UNNORMALISED
    ]


def new_net(name: str, start: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(*NETS[name](), *head, nn.Linear(WIDTHS[-1], CLASSES))
    if start == "Kaiming":  # The baseline of the paper: He et al. 2015, and zero biases.
        for parameter in net.parameters():
            (nn.init.kaiming_normal_ if parameter.dim() > 1 else nn.init.zeros_)(parameter)
    return net.to(memory_format=torch.channels_last)  # a tenth faster on CPUs


def batches(images: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after another, without end; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(images, generator=generator)
        yield from order[: images // size * size].split(size)


def run_gradinit(
    net: nn.Module, data: Digits, case: Run, iterations: int
) -> tuple[list[Iteration], float]:
    """Scale the weights of `net`; returns the iterations and their processor time.

    docs/digits.md gives the reasons for the constants, which are the same for all nets.
    """

    def loss(indices: Tensor) -> tuple[Tensor, int]:
        scores = net(data.images[indices])
        return functional.cross_entropy(scores, data.classes[indices], reduction="sum"), len(scores)

    sgd = case.optimizer == "SGD"
    config = GradInitConfig(
        **{"eta": case.rate, "target": "sgd-normalized" if sgd else "adam"},
        # A bound on the l1 norm, which is Adam's, would have to be another for every net.
        gamma=1.0 if sgd else math.inf,
        **{"iterations": iterations, "lr": 0.03, "betas": (0.9, 0.98), "norm_gains": "learned"},
        **{"min_scale": 0.01, "min_bias_scale": 0.0, "max_scale": 100.0},
    )
    half = BATCH // 2
    # Batches of its own, so that training sees the same ones with GradInit as without.
    drawn = batches(len(data.classes), 3 * half, seed=1000 + case.seed)
    pairs = (BatchPair([indices[: 2 * half]], [indices[half:]]) for indices in drawn)
    history: list[Iteration] = []
    began = time.process_time()
    with deterministic(net):
        blocks = collect_blocks({"": net}, config.norm_gains)
        learn_scales(blocks, loss, pairs, config, on_iteration=history.append)
    return history, time.process_time() - began


def run(case: Run, effort: Effort) -> Run:
    """GradInit, where the case has it, and training."""
    torch.set_num_threads(1)
    data = digits(effort.train_images)
    net = new_net(case.net, case.start, case.seed)
    weights = digest(net)
    # A process's first optimizer imports torch's compiler: seconds that are not GradInit's.
    kind = torch.optim.Adam if case.optimizer == "Adam" else partial(torch.optim.SGD, momentum=0.9)
    optimizer = kind(net.parameters(), case.rate)
    history, seconds = (
        run_gradinit(net, data, case, effort.iterations) if case.gradinit else ([], 0)
    )
    start_loss = training_loss(net, data)
    drawn = batches(len(data.classes), BATCH, case.seed)
    clip = 1.0 if case.optimizer == "SGD" and case.net in UNNORMALISED else math.inf
    train_on = partial(train, net, data, optimizer, clip)
    began = time.process_time()
    losses = train_on(islice(drawn, data.updates_per_epoch))
    per_update = (time.process_time() - began) / max(1, len(losses))
    first_epoch_loss = training_loss(net, data)
    losses += train_on(islice(drawn, data.updates_per_epoch * (case.epochs - 1)))
    learning: dict[str, float] | None = None
    if history:
        objective = sum(iteration.kind == "objective" for iteration in history)
        learning = {
            **{"objective": objective, "constraint": len(history) - objective},
            "updates": round(seconds / per_update, 1),
            **{"min_scale": history[-1].min_scale, "max_scale": history[-1].max_scale},
        }
    return replace(
        case,
        weights=weights,
        curve=[
            round(fmean(losses[i : i + AVERAGED]), 5)
            for i in range(0, len(losses) - AVERAGED + 1, AVERAGED)
        ],
        start_loss=start_loss,
        first_epoch_loss=first_epoch_loss,
        last_loss=training_loss(net, data),
        accuracy=test_accuracy(net, data),
        learning=learning,
    )


def digest(net: nn.Module) -> str:
    hashed = hashlib.sha256()
    for parameter in net.parameters():
        hashed.update(parameter.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


def train(
    net: nn.Module,
    data: Digits,
    optimizer: torch.optim.Optimizer,
    clip: float,
    drawn: Iterator[Tensor],
) -> list[float]:
    """One update for each batch; the losses before them, up to the first that is not finite."""
    losses: list[float] = []
    net.train()
    for indices in drawn:
        loss = functional.cross_entropy(net(data.images[indices]), data.classes[indices])
        if not math.isfinite(loss.item()):
            break
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if math.isfinite(clip):
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return losses


@torch.no_grad()
def training_loss(net: nn.Module, data: Digits) -> float | None:
    # Batch normalisation by the batch, as in training: after one epoch its running statistics
    # still lag behind, and would tell more of that than of the weights.
    with deterministic(net):
        loss = functional.cross_entropy(net(data.images), data.classes).item()
    return round(loss, 5) if math.isfinite(loss) else None


@torch.no_grad()
def test_accuracy(net: nn.Module, data: Digits) -> float:
    net.eval()
    correct = net(data.test_images).argmax(1) == data.test_classes
    return round(correct.float().mean().item(), 5)


# ---- All runs, and what they show. The runs of a side differ in their seeds alone.


def measure(effort: Effort) -> list[Run]:
    runs: list[Run] = []
    for setting in settings():

        def side(rate: float, gradinit: bool, more: int = 0, setting=setting) -> list[Run]:
            """Run all seeds, for `more` epochs than usual."""
            cases = (
                Run(*setting, rate, seed, gradinit, effort.epochs + more)
                for seed in range(1, effort.seeds + 1)
            )
            return [run(case, effort) for case in cases]

        rates = effort.rates[setting[0]]
        without, gradinit = ([side(rate, on) for rate in rates] for on in (False, True))
        cost = fmean(each.learning["updates"] for each in best(gradinit))
        more = math.ceil(cost / digits(effort.train_images).updates_per_epoch)
        longer = side(best(without)[0].rate, False, more)
        runs += chain(*without, *gradinit, longer)
        print("done:", *setting, file=sys.stderr, flush=True)
    return runs


@dataclass(frozen=True)
class Comparison:
    """One setting without GradInit and with it: a list of runs for each learning rate.

    Attributes:
        longer: without GradInit at its best learning rate, trained for as many epochs more as
            GradInit took time.
    """

    setting: tuple[str, str, str]
    without: list[list[Run]]
    gradinit: list[list[Run]]
    longer: list[Run]


def comparisons(runs: Sequence[Run]) -> list[Comparison]:
    found = []
    for setting, group in by(runs, lambda run: run.setting).items():
        sides = list(by(group, lambda run: (run.gradinit, run.epochs, run.rate)).values())
        *without, longer = (side for side in sides if not side[0].gradinit)
        gradinit = [side for side in sides if side[0].gradinit]
        found.append(Comparison(setting, without, gradinit, longer))
    return found


def best(sides: Sequence[list[Run]]) -> list[Run]:
    """By the loss on the training images: the test images have no say."""

    def mean_loss(side: list[Run]) -> float:
        return fmean(math.inf if run.last_loss is None else run.last_loss for run in side)

    return min(sides, key=mean_loss)


def accuracy(side: Sequence[Run]) -> str:
    return spread((100.0 * run.accuracy for run in side), 1)


def outcome(side: Sequence[Run]) -> tuple[str, str]:
    """The cells of a table that say what came of a side."""
    losses = [run.first_epoch_loss for run in side]
    diverged = losses.count(None)
    return f"{diverged} of {len(side)} diverge" if diverged else spread(losses), accuracy(side)


def tables(found: Sequence[Comparison]) -> list[Table]:
    names = ["optimizer", "net", "initialisation"]
    loss, score = "loss after 1 epoch", "test accuracy, %"
    at_best, costs, every = [], [], []
    for each in found:
        sides = best(each.without), best(each.gradinit)
        cells = [cell for side in sides for cell in (f"{side[0].rate:g}", *outcome(side))]
        at_best.append([*each.setting, *cells])
        longer = str(each.longer[0].epochs), accuracy(each.longer)
        costs.append([*each.setting, *cost(sides[1]), *longer])
        for without, gradinit in zip(each.without, each.gradinit, strict=True):
            rate = f"{without[0].rate:g}"
            every.append([*each.setting, rate, *outcome(without), *outcome(gradinit)])
    best_header = [*names, "without: lr", loss, score, "GradInit: lr", loss, score]
    cost_header = [*names, "GradInit costs, updates", "constraint iterations, %", "scales"]
    every_header = [*names, "lr", f"without: {loss}", score, f"GradInit: {loss}", score]
    title = "What GradInit costs, and training for as long without it"
    return [
        Table("Each arm at its best learning rate", best_header, at_best),
        Table(title, [*cost_header, "epochs without", score], costs),
        Table("Every learning rate", every_header, every),
    ]


def cost(side: Sequence[Run]) -> tuple[str, str, str]:
    """The cells of a table that say what GradInit did and took."""
    total = {name: [run.learning[name] for run in side] for name in side[0].learning}
    constraint = sum(total["constraint"])
    return (
        f"{fmean(total['updates']):.0f}",
        f"{100.0 * constraint / (constraint + sum(total['objective'])):.0f}",
        f"{min(total['min_scale']):.2f} to {max(total['max_scale']):.2f}",
    )


def save_picture(path: Path, found: Sequence[Comparison]) -> None:
    """A panel for each optimizer and net: losses over updates, mean and range over the seeds."""
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    panels = by(found, lambda c: c.setting[:2])
    all_axes = figure.subplots(2, len(NETS), sharex=True, sharey=True)
    for axes, ((optimizer, net), here) in zip(all_axes.flat, panels.items(), strict=True):
        for comparison in here:
            start = comparison.setting[2]
            draw(axes, best(comparison.without), start, "--")
            draw(axes, best(comparison.gradinit), f"{start} + GradInit", "-")
        axes.set_title(f"{net}, {optimizer}")
        axes.set_ylim(0.0, 3.0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in all_axes[-1]:
        axes.set_xlabel("update")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("training loss (nats)")
    figure.savefig(path, dpi=120)


def draw(axes: Axes, side: Sequence[Run], label: str, dashes: str) -> None:
    # Lines differ in dashes and darkness too, for print without colours.
    colour = {"default": "#1b3a6b", "Kaiming": "#e08214"}[side[0].start]
    # A run that diverged ends early, and the mean with it.
    points = list(zip(*(run.curve for run in side), strict=False))
    updates = [AVERAGED * (i + 0.5) for i in range(len(points))]
    label = f"{label}, lr {side[0].rate:g}"
    axes.plot(updates, [fmean(point) for point in points], dashes, color=colour, label=label)
    lows, highs = [min(point) for point in points], [max(point) for point in points]
    axes.fill_between(updates, lows, highs, color=colour, alpha=0.15, linewidth=0)


def kept(path: Path) -> list[Run]:
    """The runs in a file that `main` wrote."""
    return [Run(**row) for row in read(path)["results"]["runs"]]


def main(arguments: Sequence[str] | None = None, effort: Effort = FULL) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=effort.seeds, help="runs of each kind")
    parser.add_argument("--table", action="store_true", help="print what is kept, measure nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    path = options.results / "digits.json"
    if not options.table:
        runs = measure(replace(effort, seeds=options.seeds))
        write(path, {"runs": [*map(asdict, runs)]})
        save_picture(path.with_suffix(".png"), comparisons(runs))
    print(markdown(read(path), tables(comparisons(kept(path)))), end="")


if __name__ == "__main__":
    main()
