"""The subcommand `check`.

It trains the user's own model on the user's own data from three starts (default without warmup,
default with warmup, GradInit without warmup) at the learning rate of the command and at multiples
of it, and says what that comes to. docs/check.md has how far it can be trusted.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fairseq_gradinit.check.records import Arm, Probe
from fairseq_gradinit.check.verdict import EXIT_STATUS, judge, sentence
from fairseq_gradinit.errors import needs_plot
from fairseq_gradinit.results import current_circumstances
from fairseq_gradinit.storage import write_atomically

logger = logging.getLogger("fairseq_gradinit.check")

GRADINIT = Arm("gradinit", warmup=False)
DEFAULT = Arm("default", warmup=False)
WARMUP = Arm("default", warmup=True)
ARMS = (GRADINIT, DEFAULT, WARMUP)

RATES = (0.5, 1.0, 2.0)
LOOKS = (1, 2, 3, 5, 8, 12, 20, 30)
"""Updates after which the model is looked at, beside the last and every 20th of longer probes."""

REPORT, PICTURE, SCALES = "check.json", "check.png", "gradinit_scales.json"


def add_check(parser: argparse.ArgumentParser) -> None:
    """Make a parser that of `fairseq-gradinit check`."""
    parser.description = (
        "Make the first updates of a training without warmup, from the default initialisation and "
        "from GradInit, at its learning rate and at multiples of it, and say whether it will hold. "
        "Exit status: 0 it holds, 1 it does not, 3 cannot tell, 2 the check failed."
    )
    parser.usage = f"{parser.prog} [OPTIONS] -- fairseq-train DATA ..."
    parser.add_argument(
        "--updates", type=int, default=40, metavar="N", help="of each probe (default: 40)"
    )
    parser.add_argument(
        "--rates",
        type=multiples,
        default=RATES,
        metavar="X,Y,...",
        help=(
            "multiples of the command's learning rate that are tried; 1 always is "
            f"(default: {','.join(f'{rate:g}' for rate in RATES)})"
        ),
    )
    parser.add_argument(
        "--start",
        choices=("gradinit", "default"),
        default="gradinit",
        help="what the verdict and the exit status are about (default: gradinit)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"where to write {PICTURE}, {REPORT} and the scales, {SCALES} (default: nowhere)",
    )
    parser.add_argument(
        "training",
        nargs="+",
        metavar="COMMAND",
        help="the command line of the training in question; --gradinit options in it count",
    )
    parser.set_defaults(run=run, trouble=2)


def multiples(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def run(options: argparse.Namespace) -> int:
    """Do the check, print what came of it, and return the exit status."""
    # Before the work is done that it is for.
    if options.out is not None:
        with needs_plot("pictures"):
            from fairseq_gradinit.check import picture
        options.out.mkdir(parents=True, exist_ok=True)
    _be_calm()
    with tempfile.TemporaryDirectory(prefix="fairseq-gradinit-check-") as folder:
        lr, probes = probe_all(options, Path(folder))
        arm = Arm(options.start, warmup=False)
        (asked,) = (probe for probe in probes if probe.arm == arm and probe.lr == lr)
        verdict = sentence(asked)
        print(f"{table(probes)}\n\n{verdict}")
        if options.out is not None:
            report = {
                "command": options.command,
                "circumstances": asdict(current_circumstances(Path(__file__).parent)),
                "lr": lr,
                "verdict": verdict,
                "probes": list(map(asdict, probes)),
                "verdicts": [asdict(judge(probe)) for probe in probes],
            }
            write_atomically(options.out / REPORT, json.dumps(report, allow_nan=False) + "\n")
            picture.draw(probes).savefig(options.out / PICTURE, dpi=110)
            shutil.copyfile(Path(folder) / SCALES, options.out / SCALES)
            print(f"picture: {options.out / PICTURE}\nnumbers: {options.out / REPORT}")
    return EXIT_STATUS[judge(asked).outcome]


def _be_calm() -> None:
    """Hide what fairseq and the plugin say of a run, and torch and hydra of old interfaces."""
    warnings.simplefilter("ignore")
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    # What it advises on a rate is of the rates that are tried, not of the command's.
    logging.getLogger("fairseq_gradinit").setLevel(logging.ERROR)
    logger.setLevel(logging.INFO)


def probe_all(options: argparse.Namespace, folder: Path) -> tuple[float, list[Probe]]:
    """The learning rate of the command, and its probes: that rate first, then from low to high."""
    from fairseq_gradinit.check.probes import Prober

    prober = Prober(options.training, folder)
    others = sorted({*options.rates} - {1.0})
    looked = {*LOOKS, *range(20, options.updates, 20), options.updates}
    probes = []
    for multiple in (1.0, *others):
        for arm in ARMS:
            lr = multiple * prober.lr
            probes.append(prober.run(arm, lr, options.updates, looked))
            logger.info("%s, lr %g: %.0f s", arm.title, lr, probes[-1].seconds)
    return prober.lr, probes


# ---- What is printed.


def table(probes: Sequence[Probe]) -> str:
    """A line for each probe, from the lowest rate to the highest, and what the columns are."""
    sides = list(dict.fromkeys(side for probe in probes for side in probe.last_layer_shares()))
    rows = [_row(probe, sides) for probe in sorted(probes, key=lambda probe: probe.lr)]
    rows.insert(0, ("lr", "start", "training", "loss", *sides, "source"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if sides:
        names = ", ".join(sides)
        lines.append(f"\n{names}: share of the output that depends on the token, after the probe")
    if any(row[-1] for row in rows[1:]):
        lines.append("source: bits by which the loss grows when sentences trade sources")
    return "\n".join(lines)


def _row(probe: Probe, sides: Sequence[str]) -> tuple[str, ...]:
    shares = probe.last_layer_shares()
    losses = [f"{look.loss:.2f}" for look in (*probe.looks[:1], *probe.looks[-1:])]
    bits = probe.looks[-1].source_bits if probe.looks else None
    return (
        f"{probe.lr:g}",
        probe.arm.title,
        judge(probe).outcome,
        " to ".join(losses),
        *(f"{shares[side][-1]:.2g}" if side in shares else "" for side in sides),
        "" if bits is None else f"{bits:.2f}",
    )
