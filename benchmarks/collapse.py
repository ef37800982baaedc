"""Why high learning rates fail without warmup: the layers' outputs stop depending on the token.

    python benchmarks/collapse.py quickstart-run/corpus/data-bin     one CPU core, some 15 minutes

`make quickstart` makes that corpus. Its post-LN Transformer of 3+3 layers is trained by fairseq's
own program with the same seed, so on the same batches, from four starts. After some of the updates
fixed sentences of the validation set are looked at, as `fairseq-gradinit check` does: the
token-dependent share of the power of each layer's output, the validation loss, and the bits that it
loses when the sentences trade sources. Table and picture show the last layers.

Writes collapse.json and collapse.png.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from record import RESULTS, Table, markdown, read, write

RATE = 1e-3
UPDATES = 400
PROBED = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 400)
"""Most of them early: the collapse takes a few updates."""

# As in recipes/quickstart.py, but for the rate and the length.
TRAINING = [
    *("--task", "translation", "--arch", "transformer_gradinit_tiny", "--dropout", "0.1"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--weight-decay", "0.0001"),
    *("--lr-scheduler", "polynomial_decay", "--max-tokens", "1000"),
    *("--required-batch-size-multiple", "1", "--num-workers", "0"),
    *("--no-save", "--disable-validation", "--no-progress-bar"),
    *("--lr", f"{RATE:g}", "--seed", "1"),
]
GRADINIT = ("--gradinit", "--warmup-updates", "0")
SCALES_ALONE = (*GRADINIT, "--gradinit-centering", "off", "--gradinit-encoder-branches", "1")
# With a colour, and a marker for print without colours.
ARMS = {
    "default, no warmup": ("#c0392b", "o", ("--warmup-updates", "0")),
    "default, warmup 100": ("#1b3a6b", "s", ("--warmup-updates", "100")),
    "scales alone, no warmup": ("#e8a33d", "^", SCALES_ALONE),
    "GradInit, no warmup": ("#2e8b57", "D", GRADINIT),
}


def run(arm: str, corpus: Path) -> dict[str, Any]:
    """Trains in this process, and returns what is seen: of each side the layers in their order."""
    # Here, so that main() sets up logging before fairseq does.
    import fairseq_cli.train as program

    import fairseq_gradinit.plugin.install  # noqa: F401
    from fairseq_gradinit.check.probes import Watched, groups_of_one_size

    probes: list[dict[str, Any]] = []

    class WatchedTrainer(program.Trainer):
        def look(self) -> None:
            """Look at the model if it is time to, and leave no trace."""
            if self.get_num_updates() not in PROBED:
                return
            if not probes:
                self.task.load_dataset("valid", combine=False, epoch=1)
                data = self.task.dataset("valid")
                # Sentences of one size in each batch, which can trade sources.
                sizes = {i: np.ravel(data.size(i)).tolist() for i in range(len(data))}
                groups = groups_of_one_size(sizes, tokens=2000)
                batches = [data.collater([data[i] for i in group]) for group in groups]
                self.watched = Watched(self, batches)
            look = self.watched.look()
            layers = len(self.get_model().encoder.layers)
            probes.append(
                {
                    "update": look.update,
                    "encoder": look.shares[:layers],
                    "decoder": look.shares[layers:],
                    "loss": look.loss,
                    "source_bits": look.source_bits,
                }
            )

        def begin_epoch(self, epoch: int) -> None:
            super().begin_epoch(epoch)  # GradInit works in here
            if self.get_num_updates() == 0:
                self.look()

        def train_step(self, samples: Any, raise_oom: bool = False) -> Any:
            logged = super().train_step(samples, raise_oom)
            self.look()
            return logged

    length = str(UPDATES)
    options = [*TRAINING, "--total-num-update", length, "--max-update", length, *ARMS[arm][2]]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(
            sys, "argv", ["fairseq-train", str(corpus), *options, "--save-dir", folder]
        ),
        mock.patch.object(program, "Trainer", WatchedTrainer),
        # Of fairseq, about older interfaces of hydra and torch.
        warnings.catch_warnings(action="ignore"),
    ):
        program.cli_main()
    print(f"{arm}: loss {probes[-1]['loss']:.2f}", file=sys.stderr, flush=True)
    return {"arm": arm, "seed": 1, "command": options, "probes": probes}


def table_of(runs: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for each in runs:
        arm, probes = each["arm"], each["probes"]
        for side in ("encoder", "decoder"):
            rows.append([arm, f"share, {side}", *(f"{probe[side][-1]:.3f}" for probe in probes)])
        rows.append([arm, "validation loss", *(f"{probe['loss']:.2f}" for probe in probes)])
        rows.append([arm, "source bits", *(f"{probe['source_bits']:.3f}" for probe in probes)])
    title = f"Peak learning rate {RATE:g}, after this many updates"
    return Table(title, ["", "", *(str(probe["update"]) for probe in runs[0]["probes"])], rows)


def save_picture(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """The shares of the last layers over the updates."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    updates = [probe["update"] for probe in runs[0]["probes"]]
    keys = []
    for each in runs:
        colour, marker, _ = ARMS[each["arm"]]
        look = {"color": colour, "marker": marker, "ms": 4}
        for side, dashes in (("encoder", "-"), ("decoder", "--")):
            axes.plot(updates, [probe[side][-1] for probe in each["probes"]], dashes, **look)
        keys.append(Line2D([], [], label=each["arm"], **look))
    # Logarithmic from the first update on; the initial model is left of it.
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.5)
    axes.set_xticks(updates, [str(update) for update in updates])
    axes.minorticks_off()
    axes.set_xlim(0, updates[-1] * 1.05)
    # Whether a remnant is left, from which a layer can recover, shows on a logarithmic scale only.
    axes.set_yscale("log")
    axes.set_xlabel("updates")
    axes.set_ylabel("token-dependent share of the output")
    axes.set_title(f"Last layer of each side, peak learning rate {RATE:g}")
    axes.grid(alpha=0.3)
    keys += [Line2D([], [], color="0.3", label="encoder")]
    keys += [Line2D([], [], color="0.3", linestyle="--", label="decoder")]
    axes.legend(handles=keys, fontsize=9)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path, help="a folder that fairseq-preprocess made")
    corpus = parser.parse_args(arguments).corpus
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    runs = [run(arm, corpus) for arm in ARMS]
    path = RESULTS / "collapse.json"
    write(path, "runs", runs)
    save_picture(path.with_suffix(".png"), runs)
    print(markdown(read(path), [table_of(runs)]), end="")


if __name__ == "__main__":
    main()
