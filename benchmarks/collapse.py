"""Why high learning rates fail without warmup: the layers' outputs stop depending on the token.

    python benchmarks/collapse.py quickstart-run/corpus/data-bin     one CPU core, some 15 minutes
    python benchmarks/collapse.py quickstart-run/corpus/data-bin --lr 5e-4

`make quickstart` makes that corpus; any folder of fairseq-preprocess with a joint dictionary will
do. A post-LN Transformer of 3+3 layers is trained by fairseq's own program, with the same seed, so
on the same batches, in four ways: default initialisation without warmup, default initialisation
with warmup over a quarter of the updates (as `make quickstart-compare` has it), and without warmup
with GradInit's learned scales alone and with its default preset, which centers the LayerNorms and
starts with small encoder branches too. After some of the updates a probe looks at fixed sentences
of the validation set:

- the token-dependent share of the power of a layer's output, sum |x_t - mean x|^2 / sum |x_t|^2
  over all tokens t: 0 when every token has the same output. Tables and picture show the last layer
  of the encoder and of the decoder, the JSON file all of them;
- the validation loss, label-smoothed, base 2, per target token;
- the source bits: what the loss loses when every sentence gets its neighbour's source instead of
  its own. A model that ignores the source has 0.

Writes collapse.json and collapse.png, with the learning rate in their names if it is another one.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from record import RESULTS, Table, markdown, read, write
from torch import Tensor, nn

from fairseq_gradinit.quiet import quiet

USUAL_RATE = 1e-3
PROBED = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 400, 800, 1600, 3200)
"""Most of them early: the collapse takes a few updates."""

BATCHES = 2
"""That the probe's sentences are cut in, short ones apart from long ones."""

MARKERS = "os^D"

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
    """How much is run.

    Attributes:
        sentences: of the validation set, that the probe looks at.
        options: for fairseq-train, after all others.
        gradinit: more of them for GradInit's arm.
    """

    updates: int
    sentences: int
    options: tuple[str, ...] = ()
    gradinit: tuple[str, ...] = ()


FULL = Effort(updates=400, sentences=96)
QUICK = Effort(
    updates=4,
    sentences=16,
    options=(
        *("--encoder-embed-dim", "32", "--decoder-embed-dim", "32", "--max-tokens", "200"),
        *("--encoder-ffn-embed-dim", "64", "--decoder-ffn-embed-dim", "64"),
    ),
    gradinit=("--gradinit-iterations", "2"),
)


@dataclass(frozen=True)
class Arm:
    """One way to start training.

    Attributes:
        options: what it adds to the command line that all arms share.
    """

    name: str
    colour: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """What the probe saw after `update` updates.

    Attributes:
        encoder, decoder: token-dependent share of the output of each layer, the first layer first.
        loss: on the true sources.
        source_bits: what the loss grows by with the sources of other sentences.
    """

    update: int
    encoder: Sequence[float]
    decoder: Sequence[float]
    loss: float
    source_bits: float


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        training: loss of every update on its batch, base 2.
    """

    arm: str
    seed: int
    command: Sequence[str]
    training: Sequence[float]
    probes: Sequence[Probe]


Quantity = Callable[[Probe], float]

QUANTITIES: dict[str, tuple[Quantity, str]] = {
    "share, encoder": (lambda probe: probe.encoder[-1], ".3f"),
    "share, decoder": (lambda probe: probe.decoder[-1], ".3f"),
    "validation loss": (lambda probe: probe.loss, ".2f"),
    "source bits": (lambda probe: probe.source_bits, ".3f"),
}


def arms_for(effort: Effort) -> list[Arm]:
    warmup = effort.updates // 4
    none = ("--warmup-updates", "0")
    scales_alone = ("--gradinit", *effort.gradinit, *SCALES_ALONE)
    return [
        Arm("default, no warmup", "#c0392b", none),
        Arm(f"default, warmup {warmup}", "#1b3a6b", ("--warmup-updates", str(warmup))),
        Arm("scales alone, no warmup", "#e8a33d", (*scales_alone, *none)),
        Arm("GradInit, no warmup", "#2e8b57", ("--gradinit", *effort.gradinit, *none)),
    ]


def token_share(outputs: Sequence[Tensor], kept: Sequence[Tensor]) -> float:
    """The token-dependent share of the power of a layer's outputs.

    Args:
        outputs: one for each batch, position by sentence by channel as in fairseq.
        kept: for each batch, which position of which sentence is a token, not padding.
    """
    # Double precision: what is left of a collapse may be less than fp32 sums resolve.
    tokens = torch.cat([x[mask] for x, mask in zip(outputs, kept, strict=True)]).double()
    varying = (tokens - tokens.mean(0)).square().sum()
    return float(varying / tokens.square().sum())


class Prober:
    """Looks at a model in training from time to time, and leaves no trace.

    Attributes:
        probes: what it saw.
    """

    def __init__(self, updates: Sequence[int], sentences: int):
        self.probes: list[Probe] = []
        self._updates = set(updates)
        self._sentences = sentences
        self._batches: list[dict[str, Any]] = []

    def __call__(self, trainer: Any) -> None:
        """Look if it is time to."""
        update = trainer.get_num_updates()
        if update not in self._updates:
            return
        self._updates.remove(update)
        with quiet(trainer.get_model(), trainer.get_criterion()), torch.no_grad():
            self._batches = self._batches or validation_batches(trainer, self._sentences)
            self.probes.append(probe(trainer, self._batches))


def validation_batches(trainer: Any, sentences: int) -> list[dict[str, Any]]:
    """The same sentences every time: at even distances in the validation set sorted by length."""
    if "valid" not in trainer.task.datasets:
        trainer.task.load_dataset("valid", combine=False, epoch=1)
    data = trainer.task.dataset("valid")
    by_length = sorted(range(len(data)), key=data.num_tokens)
    sentences = min(sentences, len(data))
    chosen = [by_length[i * len(data) // sentences] for i in range(sentences)]
    cuts = [i * sentences // BATCHES for i in range(BATCHES + 1)]
    parts = [chosen[a:b] for a, b in pairwise(cuts)]
    return [trainer._prepare_sample(data.collater([data[i] for i in part]))[0] for part in parts]


def probe(trainer: Any, batches: Sequence[dict[str, Any]]) -> Probe:
    model, pad = trainer.get_model(), trainer.task.target_dictionary.pad()
    encoder, decoder = list(model.encoder.layers), list(model.decoder.layers)
    with recorded_outputs([*encoder, *decoder]) as outputs:
        loss = loss_of(trainer, batches)
    source = [batch["net_input"]["src_tokens"].ne(pad).t() for batch in batches]
    target = [batch["target"].ne(pad).t() for batch in batches]
    return Probe(
        trainer.get_num_updates(),
        encoder=[token_share(output, source) for output in outputs[: len(encoder)]],
        decoder=[token_share(output, target) for output in outputs[len(encoder) :]],
        loss=loss,
        source_bits=loss_of(trainer, [*map(with_other_sources, batches)]) - loss,
    )


@contextmanager
def recorded_outputs(layers: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """A list for each layer, of what it returns inside."""
    outputs: list[list[Tensor]] = [[] for _ in layers]

    def record(into: list[Tensor]) -> Callable[..., None]:
        # Decoder layers return attention weights too.
        return lambda _, __, out: into.append(out[0] if isinstance(out, tuple) else out)

    pairs = zip(layers, outputs, strict=True)
    hooks = [layer.register_forward_hook(record(into)) for layer, into in pairs]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def loss_of(trainer: Any, batches: Sequence[dict[str, Any]]) -> float:
    """Base 2, per target token."""
    criterion, model = trainer.get_criterion(), trainer.get_model()
    total = sum(float(criterion(model, batch)[0]) for batch in batches)
    tokens: int = sum(batch["ntokens"] for batch in batches)
    return total / tokens / math.log(2)


def with_other_sources(batch: dict[str, Any]) -> dict[str, Any]:
    """Every sentence gets the source of the one before it, the first that of the last."""
    given = batch["net_input"]
    rolled = {name: given[name].roll(1, 0) for name in ("src_tokens", "src_lengths")}
    return {**batch, "net_input": {**given, **rolled}}


def train(arguments: Sequence[str], look: Callable[[Any], None]) -> list[float]:
    """Run fairseq-train in this process.

    Args:
        arguments: its command line.
        look: called with fairseq's trainer before the first update and after every one.

    Returns:
        The loss of every update, base 2.
    """
    # Here, so that main() sets up logging before fairseq does.
    import fairseq_cli.train as program

    import fairseq_gradinit.plugin  # noqa: F401

    losses = []

    class WatchedTrainer(program.Trainer):
        def begin_epoch(self, epoch: int) -> None:
            super().begin_epoch(epoch)  # GradInit works in here
            if self.get_num_updates() == 0:
                look(self)

        def train_step(self, samples: Any, raise_oom: bool = False) -> Any:
            logged = super().train_step(samples, raise_oom)
            losses.append(float(logged["loss"]))
            look(self)
            return logged

    with (
        mock.patch.object(sys, "argv", ["fairseq-train", *arguments]),
        mock.patch.object(program, "Trainer", WatchedTrainer),
        # Of fairseq, about older interfaces of hydra and torch.
        warnings.catch_warnings(action="ignore"),
    ):
        program.cli_main()
    return losses


def options_of(arm: Arm, seed: int, rate: float, effort: Effort) -> list[str]:
    """For fairseq-train."""
    length = str(effort.updates)
    return [
        *(*TRAINING, "--lr", f"{rate:g}", "--seed", str(seed)),
        *("--total-num-update", length, "--max-update", length),
        *(*effort.options, *arm.options),
    ]


def run(arm: Arm, seed: int, rate: float, corpus: Path, effort: Effort) -> Run:
    options = options_of(arm, seed, rate, effort)
    prober = Prober([*PROBED, effort.updates], effort.sentences)
    with tempfile.TemporaryDirectory() as folder:
        training = train([str(corpus), *options, "--save-dir", folder], prober)
    last = prober.probes[-1]
    shares = f"shares {last.encoder[-1]:.3f} and {last.decoder[-1]:.3f}, loss {last.loss:.2f}"
    print(f"{arm.name}, seed {seed}: {shares}", file=sys.stderr, flush=True)
    return Run(arm.name, seed, options, training, prober.probes)


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
    title = f"Peak learning rate {rate:g}, after so many updates"
    title += f" (mean of {seeds} seeds)" if seeds > 1 else ""
    return Table(title, ["", "", *(str(probe.update) for probe in runs[0].probes)], rows)


def save_picture(path: Path, runs: Sequence[Run], arms: Sequence[Arm], rate: float) -> None:
    """The shares of the last layers over the updates, the mean of all seeds."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    # Markers too, for print without colours.
    for arm, marker in zip(arms, MARKERS, strict=True):
        for name, dashes in (("share, encoder", "-"), ("share, decoder", "--")):
            curve = mean_curve(runs, arm, QUANTITIES[name][0])
            axes.plot(
                list(curve), list(curve.values()), dashes, color=arm.colour, marker=marker, ms=4
            )
    # Logarithmic from the first update on; the initial model stands left of it.
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
    pairs = zip(arms, MARKERS, strict=True)
    keys = [Line2D([], [], color=arm.colour, marker=m, ms=4, label=arm.name) for arm, m in pairs]
    keys += [Line2D([], [], color="0.3", label="encoder")]
    keys += [Line2D([], [], color="0.3", linestyle="--", label="decoder")]
    axes.legend(handles=keys, fontsize=9)
    figure.savefig(path, dpi=120)


def name_for(rate: float) -> str:
    """Of the files with the results."""
    if rate == USUAL_RATE:
        return "collapse"
    return f"collapse-{np.format_float_scientific(rate, trim='-', exp_digits=1)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path, help="a folder that fairseq-preprocess made")
    parser.add_argument("--lr", type=float, default=USUAL_RATE, help="peak learning rate")
    parser.add_argument("--updates", type=int, help=f"{FULL.updates} by default")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(options.threads)
    effort = QUICK if options.quick else FULL
    effort = replace(effort, updates=options.updates or effort.updates)
    arms, seeds = arms_for(effort), range(1, options.seeds + 1)
    runs = [run(arm, seed, options.lr, options.corpus, effort) for seed in seeds for arm in arms]
    path = options.results / f"{name_for(options.lr)}.json"
    tables = [asdict(table_of(runs, arms, options.lr))]
    write(path, {"effort": asdict(effort), "tables": tables, "runs": [*map(asdict, runs)]})
    save_picture(path.with_suffix(".png"), runs, arms, options.lr)
    print(markdown(read(path)), end="")


if __name__ == "__main__":
    main()
