"""GradInit on real images: scikit-learn's handwritten digits, three convolutional nets.

    python benchmarks/digits.py             19 minutes on one core; writes digits.json, digits.png
    python benchmarks/digits.py --table     the tables of what is kept

docs/digits.md says what is compared, and why it is set up so.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice, pairwise, product
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

from fairseq_gradinit import engine
from fairseq_gradinit.results.tables import by, spread

SEEDS, EPOCHS, ITERATIONS = 5, 6, 100
RATES = {"SGD": (0.01, 0.03, 0.1), "Adam": (0.001, 0.003)}
BATCH = 64
Setting = tuple[str, str, str]
"""Optimizer, net and initialisation: a row of the tables."""
NORMALISED = "residual, BatchNorm"
NETS = ("plain", "residual", NORMALISED)
SETTINGS = [
    (optimizer, net, start)
    for optimizer, net, start in product(RATES, NETS, ("default", "Kaiming"))
    if start == "default" or net != NORMALISED
]
WIDTHS = (16, 32, 32)
"""Channels at 8x8, 4x4 and 2x2 pixels."""
AVERAGED = 7
"""Batches that a point of a loss curve is the mean of: a third of an epoch."""


@dataclass(frozen=True)
class Run:
    """One training run, and what came of it. Losses are in nats, None once not finite.

    Attributes:
        weights: digest of the weights before GradInit and training.
        curve: losses of the batches, each the mean of `AVERAGED`.
        start_loss, first_epoch_loss, last_loss: on all training images.
        learning: of GradInit: the iterations, its processor time in `updates` of the same net, and
            the range of the scales.
    """

    optimizer: str
    net: str
    start: str
    rate: float
    seed: int
    gradinit: bool
    epochs: int
    weights: str
    curve: Sequence[float]
    start_loss: float | None
    first_epoch_loss: float | None
    last_loss: float | None
    accuracy: float
    learning: Mapping[str, float] | None

    @property
    def setting(self) -> Setting:
        return self.optimizer, self.net, self.start


def digits() -> list[Tensor]:
    """Training and test images of shape (n, 1, 8, 8), standardised by the former; their classes."""
    data = load_digits()
    images, test_images, *classes = train_test_split(
        data.images, data.target, test_size=450, stratify=data.target, random_state=0
    )
    both = [torch.tensor(part, dtype=torch.float32).unsqueeze(1) for part in (images, test_images)]
    mean, deviation = both[0].mean(), both[0].std()
    return [*((part - mean) / deviation for part in both), *map(torch.tensor, classes)]


IMAGES, TEST_IMAGES, CLASSES, TEST_CLASSES = digits()


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
    for i, (channels, out) in enumerate(pairwise([1, *(w for w in WIDTHS for _ in range(6))])):
        layers += [nn.MaxPool2d(2)] if i in (6, 12) else []
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
    return layers


def residual_net(normalised: bool) -> list[nn.Module]:
    """A convolution and 15 residual blocks."""
    layers: list[nn.Module] = [nn.Conv2d(1, WIDTHS[0], 3, padding=1), nn.ReLU()]
    widths = [WIDTHS[0], *(w for w in WIDTHS for _ in range(5))]
    for i, (channels, out) in enumerate(pairwise(widths)):
        layers.append(ResidualBlock(channels, out, 2 if i in (5, 10) else 1, normalised))
    return layers


def new_net(name: str, start: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = plain_net() if name == "plain" else residual_net(normalised=name == NORMALISED)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))
    if start == "Kaiming":  # The baseline of the paper: He et al. 2015, and zero biases.
        for parameter in net.parameters():
            (nn.init.kaiming_normal_ if parameter.dim() > 1 else nn.init.zeros_)(parameter)
    return net.to(memory_format=torch.channels_last)  # a tenth faster on CPUs


def batches(size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after another, without end; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(IMAGES), generator=generator)
        yield from order[: len(IMAGES) // size * size].split(size)


def loss_of(net: nn.Module, indices: Tensor, reduction: str = "mean") -> Tensor:
    return functional.cross_entropy(net(IMAGES[indices]), CLASSES[indices], reduction=reduction)


def run_gradinit(net: nn.Module, optimizer: str, rate: float, seed: int) -> list[engine.Iteration]:
    """Scale the weights of `net` as `initialize()` does, except that biases may become 0."""
    sgd = optimizer == "SGD"
    config = engine.GradInitConfig(
        eta=rate,
        target="sgd-normalized" if sgd else "adam",
        # A bound on the l1 norm, which is Adam's, would have to be another for every net.
        gamma=1.0 if sgd else math.inf,
        iterations=ITERATIONS,
        lr=0.03,
        norm_gains="learned",
        min_scale=0.01,
        min_bias_scale=0.0,
        max_scale=100.0,
    )
    # Batches of its own, so that training sees the same ones with GradInit as without.
    drawn = batches(3 * BATCH // 2, seed=1000 + seed)
    pairs = (engine.BatchPair([indices[:BATCH]], [indices[BATCH // 2 :]]) for indices in drawn)
    with engine.deterministic(net):
        blocks = engine.collect_blocks({"": net}, config.norm_gains)
        learned = engine.learn_scales(
            blocks, lambda batch: (loss_of(net, batch, "sum"), len(batch)), pairs, config
        )
    return list(learned.history)


def run(setting: Setting, rate: float, seed: int, gradinit: bool, epochs: int) -> Run:
    """GradInit, if wanted, and training."""
    optimizer, name, start = setting
    net = new_net(name, start, seed)
    weights = b"".join(p.detach().contiguous().numpy().tobytes() for p in net.parameters())
    digest = hashlib.sha256(weights).hexdigest()[:16]
    kind = torch.optim.Adam if optimizer == "Adam" else partial(torch.optim.SGD, momentum=0.9)
    # Before GradInit: a process's first optimizer imports torch's compiler, which takes seconds.
    updater = kind(net.parameters(), rate)
    began = time.process_time()
    history = run_gradinit(net, optimizer, rate, seed) if gradinit else []
    seconds = time.process_time() - began
    start_loss = training_loss(net)
    drawn, updates = batches(BATCH, seed), len(IMAGES) // BATCH
    train_on = partial(train, net, updater, optimizer == "SGD" and name != NORMALISED)
    began = time.process_time()
    losses = train_on(islice(drawn, updates))
    per_update = (time.process_time() - began) / max(1, len(losses))
    first_epoch_loss = training_loss(net)
    losses += train_on(islice(drawn, updates * (epochs - 1)))
    learning: dict[str, float] | None = None
    if history:
        objective = sum(iteration.kind == "objective" for iteration in history)
        learning = {
            "objective": objective,
            "constraint": len(history) - objective,
            "updates": round(seconds / per_update, 1),
            "min_scale": history[-1].min_scale,
            "max_scale": history[-1].max_scale,
        }
    ends = range(AVERAGED, len(losses) + 1, AVERAGED)
    curve = [round(fmean(losses[end - AVERAGED : end]), 5) for end in ends]
    last_loss = training_loss(net)
    with torch.no_grad():
        right = net.eval()(TEST_IMAGES).argmax(1) == TEST_CLASSES
    before = *setting, rate, seed, gradinit, epochs, digest
    losses_at = start_loss, first_epoch_loss, last_loss
    return Run(*before, curve, *losses_at, round(right.float().mean().item(), 5), learning)


def train(
    net: nn.Module, updater: torch.optim.Optimizer, clip: bool, drawn: Iterator[Tensor]
) -> list[float]:
    """One update for each batch; the losses before them, up to the first that is not finite."""
    losses: list[float] = []
    net.train()
    for indices in drawn:
        loss = loss_of(net, indices)
        if not math.isfinite(loss.item()):
            break
        losses.append(loss.item())
        updater.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        updater.step()
    return losses


@torch.no_grad()
def training_loss(net: nn.Module) -> float | None:
    # Batch normalisation by the batch, as in training: after one epoch its running statistics
    # still lag behind, and would tell more of that than of the weights.
    with engine.deterministic(net):
        loss = functional.cross_entropy(net(IMAGES), CLASSES).item()
    return round(loss, 5) if math.isfinite(loss) else None


# ---- All runs, and what they show. The runs of a side differ in their seeds alone.


def measure() -> list[Run]:
    runs: list[Run] = []
    for setting in SETTINGS:
        arms = [
            [run_seeds(setting, rate, gradinit, EPOCHS) for rate in RATES[setting[0]]]
            for gradinit in (False, True)
        ]
        # Once more without GradInit, with as many epochs more as it took time.
        cost = fmean(each.learning["updates"] for each in best(arms[1]))
        more = math.ceil(cost / (len(IMAGES) // BATCH))
        longer = run_seeds(setting, best(arms[0])[0].rate, False, EPOCHS + more)
        runs += chain(*arms[0], *arms[1], longer)
        print("done:", *setting, file=sys.stderr, flush=True)
    return runs


def run_seeds(setting: Setting, rate: float, gradinit: bool, epochs: int) -> list[Run]:
    return [run(setting, rate, seed, gradinit, epochs) for seed in range(1, SEEDS + 1)]


def sides(runs: Sequence[Run]) -> tuple[list[list[Run]], list[list[Run]], list[Run]]:
    """Of a setting: without GradInit and with it, for each learning rate; longer without it."""
    without = by((run for run in runs if not run.gradinit), lambda run: (run.epochs, run.rate))
    *usual, longer = without.values()
    gradinit = by((run for run in runs if run.gradinit), lambda run: run.rate)
    return usual, list(gradinit.values()), longer


def best(sides: Sequence[list[Run]]) -> list[Run]:
    """By the loss on the training images: the test images have no say."""
    losses = [[math.inf if r.last_loss is None else r.last_loss for r in side] for side in sides]
    return sides[min(range(len(sides)), key=lambda i: fmean(losses[i]))]


def outcome(side: Sequence[Run]) -> tuple[str, str]:
    """The cells of a table that say what came of a side: loss after an epoch, test accuracy."""
    losses = [run.first_epoch_loss for run in side]
    diverged = losses.count(None)
    loss = f"{diverged} of {len(side)} diverge" if diverged else spread(losses)
    return loss, spread((100.0 * run.accuracy for run in side), 1)


def tables(runs: Sequence[Run]) -> list[Table]:
    names = ["optimizer", "net", "initialisation"]
    loss, score = "loss after 1 epoch", "test accuracy, %"
    at_best, costs, every = [], [], []
    for setting, group in by(runs, lambda run: run.setting).items():
        without, gradinit, longer = sides(group)
        pair = best(without), best(gradinit)
        cells = [cell for side in pair for cell in (f"{side[0].rate:g}", *outcome(side))]
        at_best.append([*setting, *cells])
        costs.append([*setting, *cost(pair[1]), str(longer[0].epochs), outcome(longer)[1]])
        for one, other in zip(without, gradinit, strict=True):
            every.append([*setting, f"{one[0].rate:g}", *outcome(one), *outcome(other)])
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


def save_picture(path: Path, runs: Sequence[Run]) -> None:
    """A panel for each optimizer and net: losses over updates, mean and range over the seeds."""
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    panels = by(runs, lambda run: (run.optimizer, run.net))
    all_axes = figure.subplots(2, len(NETS), sharex=True, sharey=True)
    for axes, ((optimizer, net), here) in zip(all_axes.flat, panels.items(), strict=True):
        for start, group in by(here, lambda run: run.start).items():
            without, gradinit, _ = sides(group)
            draw(axes, best(without), start, "--")
            draw(axes, best(gradinit), f"{start} + GradInit", "-")
        axes.set_title(f"{net}, {optimizer}")
        axes.set_ylim(0.0, 3.0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.supxlabel("update")
    figure.supylabel("training loss (nats)")
    figure.savefig(path, dpi=120)


def draw(axes: Axes, side: Sequence[Run], label: str, dashes: str) -> None:
    # Lines differ in dashes and darkness too, for print without colours.
    colour = {"default": "#1b3a6b", "Kaiming": "#e08214"}[side[0].start]
    # A run that diverged ends early, and the mean with it.
    points = list(zip(*(run.curve for run in side), strict=False))
    updates = [AVERAGED * (i + 0.5) for i in range(len(points))]
    means, lows, highs = (list(map(of, points)) for of in (fmean, min, max))
    axes.plot(updates, means, dashes, color=colour, label=f"{label}, lr {side[0].rate:g}")
    axes.fill_between(updates, lows, highs, color=colour, alpha=0.15, linewidth=0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="print what is kept, measure nothing")
    path = RESULTS / "digits.json"
    if not parser.parse_args(arguments).table:
        torch.set_num_threads(1)
        runs = measure()
        write(path, "runs", [*map(asdict, runs)])
        save_picture(path.with_suffix(".png"), runs)
    print(markdown(read(path), tables(kept(path))), end="")


def kept(path: Path) -> list[Run]:
    return [Run(**row) for row in read(path)["results"]["runs"]]


if __name__ == "__main__":
    main()
