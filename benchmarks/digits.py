"""GradInit on real images: scikit-learn's handwritten digits, three convolutional nets.

A plain net of 18 convolutions without normalisation, a residual net of 15 blocks without it, and
the same residual net with batch normalisation. Each is trained by SGD with momentum and by Adam,
from PyTorch's default initialisation and the nets without normalisation also from Kaiming's,
with GradInit before training and without. Arms of one seed share weights, batches and number of
updates, and each arm is judged at the learning rate, of the same few, that suits it best.

Writes digits.json and digits.png, and prints the tables: `python benchmarks/digits.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import RESULTS, Table, markdown, read, write
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from fairseq_gradinit.blocks import collect_blocks
from fairseq_gradinit.config import GradInitConfig
from fairseq_gradinit.engine import BatchPair, Iteration, learn_scales
from fairseq_gradinit.quiet import quiet

Start = Literal["default", "Kaiming"]
OptimizerName = Literal["sgd", "adam"]

TEST_IMAGES = 450
BATCH = 64
CLASSES = 10
WIDTHS = (16, 32, 32)
"""Channels at 8x8, 4x4 and 2x2 pixels."""


@dataclass(frozen=True)
class Effort:
    """How much is run.

    Attributes:
        train_images: how many of the training images are used; None is all of them.
        iterations: of GradInit.
        rates: the learning rates that every arm is tried with.
    """

    seeds: int
    epochs: int
    iterations: int
    rates: Mapping[OptimizerName, Sequence[float]]
    train_images: int | None = None


FULL = Effort(
    seeds=5, epochs=6, iterations=100, rates={"sgd": (0.01, 0.03, 0.1), "adam": (0.001, 0.003)}
)
QUICK = Effort(
    seeds=1, epochs=1, iterations=1, rates={"sgd": (0.03,), "adam": (0.001,)}, train_images=128
)


@dataclass(frozen=True)
class Setting:
    """A row of the tables: what the arms have in common but for the learning rate."""

    net: str
    start: Start
    optimizer: OptimizerName


@dataclass(frozen=True)
class Case:
    """One training run."""

    setting: Setting
    rate: float
    seed: int
    gradinit: bool
    epochs: int
    iterations: int
    train_images: int | None


@dataclass(frozen=True)
class Learning:
    """What GradInit did before a run.

    Attributes:
        objective, constraint: iterations of either kind.
        updates: its processor time in training updates of the same net.
        min_scale, max_scale: range of the scales it ended with.
    """

    objective: int
    constraint: int
    updates: float
    min_scale: float
    max_scale: float


@dataclass(frozen=True)
class Outcome:
    """What came of a run. Losses are mean cross entropies in nats, None once not finite.

    Attributes:
        weights: digest of the weights before GradInit and training.
        curve: losses of the batches, averaged over thirds of an epoch.
        start_loss, first_epoch_loss, last_loss: on all training images, before the first update,
            after one epoch, and after the last.
        accuracy: on the test images, after the last epoch.
    """

    case: Case
    weights: str
    curve: list[float]
    start_loss: float | None
    first_epoch_loss: float | None
    last_loss: float | None
    accuracy: float
    gradinit: Learning | None


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


def plain_net() -> nn.Module:
    """18 convolutions and a linear layer; VGG's recipe without normalisation."""
    layers: list[nn.Module] = []
    channels = 1
    for stage, width in enumerate(WIDTHS):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(6):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, *_head(channels))


def residual_net(normalised: bool) -> nn.Module:
    """A convolution, 15 residual blocks, and a linear layer."""
    channels = WIDTHS[0]
    layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()]
    for stage, width in enumerate(WIDTHS):
        for block in range(5):
            stride = 2 if stage and not block else 1
            layers.append(ResidualBlock(channels, width, stride, normalised))
            channels = width
    return nn.Sequential(*layers, *_head(channels))


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain_net,
    "residual": partial(residual_net, normalised=False),
    "residual, BatchNorm": partial(residual_net, normalised=True),
}
UNNORMALISED = ("plain", "residual")


def starts(net: str) -> tuple[Start, ...]:
    return ("default", "Kaiming") if net in UNNORMALISED else ("default",)


def new_net(setting: Setting, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = NETS[setting.net]()
    if setting.start == "Kaiming":
        net.apply(_kaiming)
    return net.to(memory_format=torch.channels_last)  # a tenth faster on CPUs


def _kaiming(module: nn.Module) -> None:
    """The baseline of the paper: He et al. 2015 for the weights, and zero biases."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def batches(images: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of one batch after another, without end; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(images, generator=generator)
        yield from order[: images // size * size].split(size)


def gradinit_config(case: Case) -> GradInitConfig:
    """The same for all nets; docs/digits.md says why."""
    sgd = case.setting.optimizer == "sgd"
    return GradInitConfig(
        eta=case.rate,
        target="sgd-normalized" if sgd else "adam",
        # A bound on the l1 norm, which is Adam's, would have to be another for every net.
        gamma=1.0 if sgd else math.inf,
        iterations=case.iterations,
        lr=0.03,
        betas=(0.9, 0.98),
        min_scale=0.01,
        min_bias_scale=0.0,
        max_scale=100.0,
        norm_gains="learned",
    )


def run_gradinit(net: nn.Module, data: Digits, case: Case) -> tuple[list[Iteration], float]:
    """Scale the weights of `net`; returns what the iterations did, and their processor time."""

    def loss(indices: Tensor) -> tuple[Tensor, int]:
        scores = net(data.images[indices])
        return functional.cross_entropy(scores, data.classes[indices], reduction="sum"), len(scores)

    half = BATCH // 2
    # Batches of its own, so that training sees the same ones with GradInit as without.
    drawn = batches(len(data.classes), 3 * half, seed=1000 + case.seed)
    pairs = (BatchPair([indices[: 2 * half]], [indices[half:]]) for indices in drawn)
    config = gradinit_config(case)
    history: list[Iteration] = []
    began = time.process_time()
    with quiet(net):
        blocks = collect_blocks({"": net}, config.norm_gains)
        learn_scales(blocks, loss, pairs, config, on_iteration=history.append)
    return history, time.process_time() - began


def summary(history: Sequence[Iteration], updates: float) -> Learning:
    objective = sum(iteration.kind == "objective" for iteration in history)
    return Learning(
        objective,
        len(history) - objective,
        round(updates, 1),
        history[-1].min_scale,
        history[-1].max_scale,
    )


def run(case: Case) -> Outcome:
    """GradInit, where the case has it, and training."""
    torch.set_num_threads(1)
    data = digits(case.train_images)
    net = new_net(case.setting, case.seed)
    weights = digest(net)
    # A process's first optimizer imports torch's compiler: seconds that are not GradInit's.
    optimizer = new_optimizer(net, case)
    history, seconds = run_gradinit(net, data, case) if case.gradinit else ([], 0.0)
    start_loss = training_loss(net, data)
    drawn = batches(len(data.classes), BATCH, case.seed)
    train_on = partial(train, net, data, optimizer, clip_norm(case.setting))
    began = time.process_time()
    losses = train_on(islice(drawn, data.updates_per_epoch))
    per_update = (time.process_time() - began) / max(1, len(losses))
    first_epoch_loss = training_loss(net, data)
    rest = data.updates_per_epoch * (case.epochs - 1)
    losses += train_on(islice(drawn, rest))
    return Outcome(
        case,
        weights,
        averages(losses, max(1, data.updates_per_epoch // 3)),
        start_loss,
        first_epoch_loss,
        training_loss(net, data),
        test_accuracy(net, data),
        summary(history, seconds / per_update) if history else None,
    )


def digest(net: nn.Module) -> str:
    hashed = hashlib.sha256()
    for parameter in net.parameters():
        hashed.update(parameter.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


def new_optimizer(net: nn.Module, case: Case) -> torch.optim.Optimizer:
    if case.setting.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), case.rate, momentum=0.9)
    return torch.optim.Adam(net.parameters(), case.rate)


def clip_norm(setting: Setting) -> float:
    """As the paper's authors train: SGD's gradient is clipped unless the net is normalised."""
    clips = setting.optimizer == "sgd" and setting.net in UNNORMALISED
    return 1.0 if clips else math.inf


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
    with quiet(net):
        loss = functional.cross_entropy(net(data.images), data.classes).item()
    return round(loss, 5) if math.isfinite(loss) else None


@torch.no_grad()
def test_accuracy(net: nn.Module, data: Digits) -> float:
    net.eval()
    correct = net(data.test_images).argmax(1) == data.test_classes
    return round(correct.float().mean().item(), 5)


def averages(values: Sequence[float], window: int) -> list[float]:
    starts = range(0, len(values) - window + 1, window)
    return [round(fmean(values[i : i + window]), 5) for i in starts]


@dataclass(frozen=True)
class Arm:
    """The runs of one setting, with GradInit or without, at one learning rate; one a seed."""

    outcomes: list[Outcome]

    @property
    def rate(self) -> float:
        return self.outcomes[0].case.rate

    @property
    def mean_last_loss(self) -> float:
        losses = [o.last_loss for o in self.outcomes]
        return fmean(math.inf if loss is None else loss for loss in losses)

    @property
    def first_epoch(self) -> str:
        losses = [o.first_epoch_loss for o in self.outcomes]
        finite = [loss for loss in losses if loss is not None]
        if len(finite) < len(losses):
            return f"{len(losses) - len(finite)} of {len(losses)} diverge"
        return spread(finite, 2)

    @property
    def accuracy(self) -> str:
        return spread([100.0 * o.accuracy for o in self.outcomes], 1)

    @property
    def learnings(self) -> list[Learning]:
        return [o.gradinit for o in self.outcomes if o.gradinit is not None]


def spread(values: Sequence[float], places: int) -> str:
    """Mean and standard deviation over the seeds."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.{places}f} ± {deviation:.{places}f}"


@dataclass(frozen=True)
class Comparison:
    """One setting without GradInit and with it: an arm for each learning rate.

    Attributes:
        longer: without GradInit at its best learning rate, trained for as many epochs more as
            GradInit took time.
    """

    setting: Setting
    without: list[Arm]
    gradinit: list[Arm]
    longer: Arm

    @property
    def best_without(self) -> Arm:
        return best(self.without)

    @property
    def best_gradinit(self) -> Arm:
        return best(self.gradinit)


def best(arms: Sequence[Arm]) -> Arm:
    """By the loss on the training images: the test images have no say."""
    return min(arms, key=lambda arm: arm.mean_last_loss)


RunAll = Callable[[Sequence[Case]], list[Outcome]]


def compare(setting: Setting, effort: Effort, run_all: RunAll) -> Comparison:
    def arm(rate: float, gradinit: bool, epochs: int = effort.epochs) -> Arm:
        seeds = range(1, effort.seeds + 1)
        size = (epochs, effort.iterations, effort.train_images)
        return Arm(run_all([Case(setting, rate, seed, gradinit, *size) for seed in seeds]))

    rates = effort.rates[setting.optimizer]
    without = [arm(rate, gradinit=False) for rate in rates]
    gradinit = [arm(rate, gradinit=True) for rate in rates]
    cost = fmean(learning.updates for learning in best(gradinit).learnings)
    more = math.ceil(cost / digits(effort.train_images).updates_per_epoch)
    longer = arm(best(without).rate, gradinit=False, epochs=effort.epochs + more)
    print("done:", *names(setting), file=sys.stderr, flush=True)
    return Comparison(setting, without, gradinit, longer)


def settings(effort: Effort) -> list[Setting]:
    return [
        Setting(net, start, optimizer)
        for optimizer in effort.rates
        for net in NETS
        for start in starts(net)
    ]


def names(setting: Setting) -> tuple[str, str, str]:
    return {"sgd": "SGD", "adam": "Adam"}[setting.optimizer], setting.net, setting.start


def best_table(comparisons: Sequence[Comparison]) -> Table:
    header = ["optimizer", "net", "initialisation"]
    for arm in ("without", "GradInit"):
        header += [f"{arm}: lr", "loss after 1 epoch", "test accuracy, %"]
    rows = []
    for comparison in comparisons:
        row = [*names(comparison.setting)]
        for arm in (comparison.best_without, comparison.best_gradinit):
            row += [f"{arm.rate:g}", arm.first_epoch, arm.accuracy]
        rows.append(row)
    return Table("Each arm at its best learning rate", header, rows)


def cost_table(comparisons: Sequence[Comparison]) -> Table:
    header = ["optimizer", "net", "initialisation", "GradInit costs, updates"]
    header += ["constraint iterations, %", "scales", "epochs without", "test accuracy, %"]
    rows = []
    for comparison in comparisons:
        learnings = comparison.best_gradinit.learnings
        iterations = [learning.objective + learning.constraint for learning in learnings]
        share = sum(learning.constraint for learning in learnings) / sum(iterations)
        lowest = min(learning.min_scale for learning in learnings)
        highest = max(learning.max_scale for learning in learnings)
        rows.append(
            [
                *names(comparison.setting),
                f"{fmean(learning.updates for learning in learnings):.0f}",
                f"{100.0 * share:.0f}",
                f"{lowest:.2f} to {highest:.2f}",
                str(comparison.longer.outcomes[0].case.epochs),
                comparison.longer.accuracy,
            ]
        )
    title = "What GradInit costs, and training for as long without it"
    return Table(title, header, rows)


def rates_table(comparisons: Sequence[Comparison]) -> Table:
    header = ["optimizer", "net", "initialisation", "lr"]
    header += ["without: loss after 1 epoch", "test accuracy, %"]
    header += ["GradInit: loss after 1 epoch", "test accuracy, %"]
    rows = []
    for comparison in comparisons:
        for without, gradinit in zip(comparison.without, comparison.gradinit, strict=True):
            row = [*names(comparison.setting), f"{without.rate:g}"]
            for arm in (without, gradinit):
                row += [arm.first_epoch, arm.accuracy]
            rows.append(row)
    return Table("Every learning rate", header, rows)


def save_picture(path: Path, comparisons: Sequence[Comparison]) -> None:
    """A panel for each optimizer and net: losses over updates, mean and range over the seeds."""
    optimizers = list(dict.fromkeys(c.setting.optimizer for c in comparisons))
    figure = Figure(figsize=(13, 3.6 * len(optimizers)), layout="constrained")
    panels = figure.subplots(len(optimizers), len(NETS), sharex=True, sharey=True, squeeze=False)
    for row, optimizer in zip(panels, optimizers, strict=True):
        for axes, net in zip(row, NETS, strict=True):
            here = [
                c for c in comparisons if (c.setting.optimizer, c.setting.net) == (optimizer, net)
            ]
            draw_panel(axes, here)
    for axes in panels[-1]:
        axes.set_xlabel("update")
    for axes in panels[:, 0]:
        axes.set_ylabel("training loss (nats)")
    figure.savefig(path, dpi=120)


def draw_panel(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    # Lines differ in dashes and darkness too, for print without colours.
    colours = {"default": "#1b3a6b", "Kaiming": "#e08214"}
    for comparison in comparisons:
        start = comparison.setting.start
        colour = colours[start]
        without, gradinit = comparison.best_without, comparison.best_gradinit
        draw_arm(axes, without, f"{start}, lr {without.rate:g}", colour, "--")
        draw_arm(axes, gradinit, f"{start} + GradInit, lr {gradinit.rate:g}", colour, "-")
    optimizer, net, _ = names(comparisons[0].setting)
    axes.set_title(f"{net}, {optimizer}")
    axes.set_ylim(0.0, 3.0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_arm(axes: Axes, arm: Arm, label: str, colour: str, dashes: str) -> None:
    # A run that diverged ends early, and the mean with it.
    points = list(zip(*(outcome.curve for outcome in arm.outcomes), strict=False))
    case = arm.outcomes[0].case
    window = max(1, digits(case.train_images).updates_per_epoch // 3)
    updates = [window * (i + 0.5) for i in range(len(points))]
    axes.plot(updates, [fmean(point) for point in points], dashes, color=colour, label=label)
    lows, highs = [min(point) for point in points], [max(point) for point in points]
    axes.fill_between(updates, lows, highs, color=colour, alpha=0.15, linewidth=0)


def kept(comparison: Comparison) -> list[dict[str, object]]:
    """Every run of a comparison, for the JSON file."""
    arms = [*comparison.without, *comparison.gradinit, comparison.longer]
    return [flat(asdict(outcome)) for arm in arms for outcome in arm.outcomes]


def flat(row: dict[str, Any]) -> dict[str, object]:
    """The case's fields among the outcome's; what GradInit did stands for whether it ran."""
    case = row.pop("case")
    return {**case.pop("setting"), **case, **row}


def measure(effort: Effort, jobs: int) -> list[Comparison]:
    if jobs == 1:
        return [compare(s, effort, lambda cases: [*map(run, cases)]) for s in settings(effort)]
    with ProcessPoolExecutor(jobs) as pool:
        return [compare(s, effort, lambda cases: [*pool.map(run, cases)]) for s in settings(effort)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, help=f"runs of each arm, {FULL.seeds} by default")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument(
        "--results", type=Path, help=f"folder to write to, {RESULTS.name} by default"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    effort = QUICK if options.quick else FULL
    effort = replace(effort, seeds=options.seeds or effort.seeds)
    comparisons = measure(effort, options.jobs)
    tables = [best_table(comparisons), cost_table(comparisons), rates_table(comparisons)]
    results = {
        "effort": asdict(effort),
        "tables": [*map(asdict, tables)],
        "runs": [row for comparison in comparisons for row in kept(comparison)],
    }
    folder = options.results or (Path(tempfile.mkdtemp()) if options.quick else RESULTS)
    path = folder / "digits.json"
    write(path, results)
    save_picture(path.with_suffix(".png"), comparisons)
    print(markdown(read(path)), end="")


if __name__ == "__main__":
    main()
