"""Why high learning rates fail without warmup: the layers' outputs stop depending on the token.

    python benchmarks/collapse.py quickstart-run/corpus/data-bin     one CPU core, some 15 minutes
    python benchmarks/collapse.py quickstart-run/corpus/data-bin --lr 5e-4

`make quickstart` makes that corpus; any folder of fairseq-preprocess with a joint dictionary will
do. A post-LN Transformer of 3+3 layers is trained by fairseq's own program, with the same seed, so
on the same batches, in four ways: default initialisation without warmup, default initialisation
with warmup over a quarter of the updates (as `make quickstart-compare` has it), and without warmup
with GradInit's learned scales alone and with its default preset, which centers the LayerNorms and
starts with small encoder branches too. After some of the updates fixed sentences of the validation
set are looked at, as `fairseq-gradinit check` does (`fairseq_gradinit/check/records.py`, `Look`):
the token-dependent share of the power of each layer's output, the validation loss, and the bits
that it loses when the sentences trade sources. Tables and picture show the last layers.

Writes collapse.json and collapse.png, with the learning rate in their names if it is another one.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from record import RESULTS, Table, markdown, read, write

USUAL_RATE = 1e-3
PROBED = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 400, 800, 1600, 3200)
"""Most of them early: the collapse takes a few updates."""

LOOKED_AT = 2000
"""Tokens of the validation set."""

# As in recipes/quickstart.py, but for the rate and the length.
TRAINING = [
    *("--task", "translation", "--arch", "transformer_gradinit_tiny", "--dropout", "0.1"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--weight-decay", "0.0001"),
    *("--lr-scheduler", "polynomial_decay", "--max-tokens", "1000"),
    *("--required-batch-size-multiple", "1", "--num-workers", "0"),
    *("--no-save", "--disable-validation", "--no-progress-bar"),
]
SCALES_ALONE = ("--gradinit-centering", "off", "--gradinit-encoder-branches", "1")


@dataclass(frozen=True)
class Effort:
    """How much is run; `options` end the command line, `gradinit` is for GradInit's arms."""

    updates: int
    options: tuple[str, ...] = ()
    gradinit: tuple[str, ...] = ()


FULL = Effort(updates=400)


@dataclass(frozen=True)
class Arm:
    """One way to start training: `options` come after those that all arms share."""

    name: str
    colour: str
    marker: str
    options: tuple[str, ...]

    @property
    def look(self) -> dict[str, Any]:
        """Of its lines; the marker is for print without colours."""
        return {"color": self.colour, "marker": self.marker, "ms": 4}


@dataclass(frozen=True)
class Probe:
    """What was seen after `update` updates, see `fairseq_gradinit.check.records.Look`.

    Attributes:
        encoder, decoder: token-dependent share of the output of each layer, the first layer first.
    """

    update: int
    encoder: Sequence[float]
    decoder: Sequence[float]
    loss: float
    source_bits: float


@dataclass(frozen=True)
class Run:
    arm: str
    seed: int
    command: Sequence[str]
    probes: Sequence[Probe]


Quantity = Callable[[Probe], float]

QUANTITIES: dict[str, tuple[Quantity, str]] = {
    "share, encoder": (lambda probe: probe.encoder[-1], ".3f"),
    "share, decoder": (lambda probe: probe.decoder[-1], ".3f"),
    "validation loss": (lambda probe: probe.loss, ".2f"),
    "source bits": (lambda probe: probe.source_bits, ".3f"),
}


def arms_for(effort: Effort) -> list[Arm]:
    warmup = str(effort.updates // 4)
    none = ("--warmup-updates", "0")
    gradinit = ("--gradinit", *effort.gradinit, *none)
    return [
        Arm("default, no warmup", "#c0392b", "o", none),
        Arm(f"default, warmup {warmup}", "#1b3a6b", "s", ("--warmup-updates", warmup)),
        Arm("scales alone, no warmup", "#e8a33d", "^", (*gradinit, *SCALES_ALONE)),
        Arm("GradInit, no warmup", "#2e8b57", "D", gradinit),
    ]


def train(arguments: Sequence[str], updates: Sequence[int]) -> list[Probe]:
    """What is seen after some of the updates of fairseq-train, which runs in this process."""
    # Here, so that main() sets up logging before fairseq does.
    import fairseq_cli.train as program

    import fairseq_gradinit.plugin.install  # noqa: F401
    from fairseq_gradinit.check.batches import groups_of_one_size
    from fairseq_gradinit.check.probes import Watched

    probes: list[Probe] = []
    left = set(updates)

    class WatchedTrainer(program.Trainer):
        def look(self) -> None:
            """Look at the model if it is time to, and leave no trace."""
            if self.get_num_updates() not in left:
                return
            left.remove(self.get_num_updates())
            if not probes:
                self.task.load_dataset("valid", combine=False, epoch=1)
                data = self.task.dataset("valid")
                # Sentences of one size in each batch, which can trade sources.
                sizes = {i: np.ravel(data.size(i)).tolist() for i in range(len(data))}
                groups = groups_of_one_size(sizes, LOOKED_AT)
                batches = [data.collater([data[i] for i in group]) for group in groups]
                self.watched = Watched(self, batches)
            look = self.watched.look()
            layers = len(self.get_model().encoder.layers)
            encoder, decoder = look.shares[:layers], look.shares[layers:]
            probes.append(Probe(look.update, encoder, decoder, look.loss, look.source_bits))

        def begin_epoch(self, epoch: int) -> None:
            super().begin_epoch(epoch)  # GradInit works in here
            if self.get_num_updates() == 0:
                self.look()

        def train_step(self, samples: Any, raise_oom: bool = False) -> Any:
            logged = super().train_step(samples, raise_oom)
            self.look()
            return logged

    with (
        mock.patch.object(sys, "argv", ["fairseq-train", *arguments]),
        mock.patch.object(program, "Trainer", WatchedTrainer),
        # Of fairseq, about older interfaces of hydra and torch.
        warnings.catch_warnings(action="ignore"),
    ):
        program.cli_main()
    return probes


def run(arm: Arm, seed: int, rate: float, corpus: Path, effort: Effort) -> Run:
    length = str(effort.updates)
    options = [
        *(*TRAINING, "--lr", f"{rate:g}", "--seed", str(seed)),
        *("--total-num-update", length, "--max-update", length),
        *(*effort.options, *arm.options),
    ]
    with tempfile.TemporaryDirectory() as folder:
        probes = train([str(corpus), *options, "--save-dir", folder], [*PROBED, effort.updates])
    last = probes[-1]
    shares = f"shares {last.encoder[-1]:.3f} and {last.decoder[-1]:.3f}, loss {last.loss:.2f}"
    print(f"{arm.name}, seed {seed}: {shares}", file=sys.stderr, flush=True)
    return Run(arm.name, seed, options, probes)


def mean_curve(runs: Sequence[Run], arm: Arm, quantity: Quantity) -> dict[int, float]:
    """The mean of `quantity` over the seeds of an arm, by update."""
    probes = [run.probes for run in runs if run.arm == arm.name]
    return {at[0].update: fmean(map(quantity, at)) for at in zip(*probes, strict=True)}


def table_of(runs: Sequence[Run], arms: Sequence[Arm], rate: float) -> Table:
    seeds = len({run.seed for run in runs})
    rows = []
    for arm in arms:
        for name, (quantity, digits) in QUANTITIES.items():
            curve = mean_curve(runs, arm, quantity)
            rows.append([arm.name, name, *(f"{value:{digits}}" for value in curve.values())])
    title = f"Peak learning rate {rate:g}, after this many updates"
    title += f" (mean of {seeds} seeds)" if seeds > 1 else ""
    return Table(title, ["", "", *(str(probe.update) for probe in runs[0].probes)], rows)


def save_picture(path: Path, runs: Sequence[Run], arms: Sequence[Arm], rate: float) -> None:
    """The shares of the last layers over the updates, the mean of all seeds."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm in arms:
        for name, dashes in (("share, encoder", "-"), ("share, decoder", "--")):
            curve = mean_curve(runs, arm, QUANTITIES[name][0])
            axes.plot(*zip(*curve.items(), strict=True), dashes, **arm.look)
    # Logarithmic from the first update on; the initial model is left of it.
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.5)
    updates = [probe.update for probe in runs[0].probes]
    axes.set_xticks(updates, [str(update) for update in updates])
    axes.minorticks_off()
    axes.set_xlim(0, updates[-1] * 1.05)
    # Whether a remnant is left, from which a layer can recover, shows on a logarithmic scale only.
    axes.set_yscale("log")
    axes.set_xlabel("updates")
    axes.set_ylabel("token-dependent share of the output")
    axes.set_title(f"Last layer of each side, peak learning rate {rate:g}")
    axes.grid(alpha=0.3)
    keys = [Line2D([], [], label=arm.name, **arm.look) for arm in arms]
    keys += [Line2D([], [], color="0.3", label="encoder")]
    keys += [Line2D([], [], color="0.3", linestyle="--", label="decoder")]
    axes.legend(handles=keys, fontsize=9)
    figure.savefig(path, dpi=120)


def name_for(rate: float) -> str:
    """Of the files with the results."""
    if rate == USUAL_RATE:
        return "collapse"
    return f"collapse-{np.format_float_scientific(rate, trim='-', exp_digits=1)}"


def main(arguments: Sequence[str] | None = None, effort: Effort = FULL) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path, help="a folder that fairseq-preprocess made")
    parser.add_argument("--lr", type=float, default=USUAL_RATE, help="peak learning rate")
    parser.add_argument("--updates", type=int, default=effort.updates, help="of each run")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    effort = replace(effort, updates=options.updates)
    arms, seeds = arms_for(effort), range(1, options.seeds + 1)
    runs = [run(arm, seed, options.lr, options.corpus, effort) for seed in seeds for arm in arms]
    path = options.results / f"{name_for(options.lr)}.json"
    write(path, {"runs": [*map(asdict, runs)]})
    save_picture(path.with_suffix(".png"), runs, arms, options.lr)
    print(markdown(read(path), [table_of(runs, arms, options.lr)]), end="")


if __name__ == "__main__":
    main()
