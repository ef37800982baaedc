"""The program `fairseq-gradinit`: what there is to do before and after training.

A subcommand is a function that adds its parser to the others, with what it does as the default of
`run`, and stands in SUBCOMMANDS. What it does returns the exit status, None being 0; what takes
long to import is imported by it.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairseq_gradinit.check import program as check
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results import MARGIN, RunRecord, read_runs

PROGRAM = "fairseq-gradinit"

EXTRA_PACKAGES = ("jinja2", "markupsafe", "matplotlib")
"""What may be missing where no picture or page was asked for."""

# argparse does not give a name to the type of what `add_subparsers` returns.
Subparsers = Any


def add_table(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "table",
        help="print Markdown tables of runs",
        description=(
            "Print a Markdown table for each corpus and model: a row for each recipe and its "
            "settings, with mean and standard deviation over the seeds."
        ),
    )
    add_results(parser)
    parser.add_argument(
        "--published",
        type=Path,
        metavar="FILE",
        help=(
            'figures of papers to stand beside the runs of a recipe: a JSON array of {"corpus": '
            '"iwslt14-de-en", "recipe": "iwslt14_de_en/gradinit-adam", "metric": "BLEU", "value": '
            '..., "source": "https://..., Table ..."}; a source must have a link'
        ),
    )
    parser.set_defaults(run=print_tables)


def print_tables(options: Namespace) -> None:
    """Print the tables.

    Raises:
        GradInitError: a file cannot be used.
    """
    from fairseq_gradinit.results import tables

    published = tables.read_published(options.published) if options.published else []
    print(tables.report(runs_in(options.results), published, options.command), end="")


def add_heat_map(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "heat-map",
        help="draw the runs of sweeps",
        description=(
            "Draw validation loss over learning rates and beta2 or momentum, a panel for each "
            "recipe, and say which share of its cells trains: in those each run ends at least "
            f"{MARGIN} bits below the unigram plateau of its corpus."
        ),
    )
    add_results(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.set_defaults(run=draw_heat_map)


def draw_heat_map(options: Namespace) -> None:
    """Write the picture.

    Raises:
        GradInitError: a file cannot be used, or matplotlib is missing.
    """
    runs = runs_in(options.results)
    with _extra("plot", "heat maps"):
        from fairseq_gradinit.results import heat_map
    heat_map.save(heat_map.draw(heat_map.panels_of(runs)), options.out)


def add_report(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "report",
        help="make a page that shows what GradInit did",
        description=(
            "Make an HTML page of one or several runs side by side: the scales over depth, the "
            "iterations, what they did to the residual branches and to the norms of the weights, "
            "and the settings. It needs nothing beside it."
        ),
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="the --save-dir of a run with --gradinit, or a scales file",
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE.html")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write the figures there too")
    parser.set_defaults(run=make_report)


def make_report(options: Namespace) -> None:
    """Write the page.

    Raises:
        GradInitError: a file cannot be used, or matplotlib is missing.
    """
    from fairseq_gradinit.report import runs as report_runs

    runs = report_runs.read_runs(options.runs)
    with _extra("plot", "reports"):
        from fairseq_gradinit.report import page as report
    for path in report.save(runs, options.out, options.png, options.command):
        print(path)


def add_check(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "check",
        help="say whether training will hold without warmup, by a few dozen updates",
        description=(
            "Make the first updates of a training without warmup, from the default initialisation "
            "and from GradInit, at its learning rate and at multiples of it, and say whether it "
            "will hold. Exit status: 0 it holds, 1 it does not, 3 cannot tell, 2 the check cannot "
            "be made."
        ),
    )
    check.add_options(parser)
    parser.set_defaults(run=check.run, trouble=2)


def add_diff(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "diff",
        help="say how the scales of two runs differ",
        description=(
            "Print the tensors whose scales differ, and the settings that do. Exit status: 0 all "
            "scales are equal, 1 some are not, 2 they cannot be compared."
        ),
    )
    add_run(parser, "a")
    add_run(parser, "b")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="RELATIVE",
        help="how far apart two scales may be and count as equal (default: %(default)s)",
    )
    parser.set_defaults(run=print_diff, trouble=2)


def print_diff(options: Namespace) -> int:
    """Print the differences; returns 1 if scales differ.

    Raises:
        GradInitError: a file cannot be read, or the tolerance is negative.
    """
    from fairseq_gradinit.report.runs import scales_file
    from fairseq_gradinit.scales import Scales, differing_scales, differing_settings

    if not options.tolerance >= 0:
        raise GradInitError(f"--tolerance {options.tolerance:g} is not a number from 0 up")
    a, b = (Scales.load(scales_file(path)) for path in (options.a, options.b))
    scales = differing_scales(a, b, options.tolerance)
    for line in scales:
        print(line)
    for line in differing_settings(a, b):
        print(f"setting {line}")
    print(f"{len(scales)} of {len({x.name for s in (a, b) for x in s.blocks})} tensors differ")
    return int(bool(scales))


def add_apply(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "apply",
        help="multiply the weights in a checkpoint by scales",
        description=(
            "Write a copy of a checkpoint whose weights are multiplied by the scales, for trainers "
            "that do not load the plugin. LayerNorms are not centered: that takes training data."
        ),
    )
    add_run(parser, "scales")
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="of fairseq, with the initial weights; or a file with a model's state dict",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="NEW.pt")
    parser.set_defaults(run=apply_scales)


def apply_scales(options: Namespace) -> None:
    """Write the copy.

    Raises:
        GradInitError: a file cannot be used, or the scales do not fit.
    """
    from fairseq_gradinit.plugin.checkpoint_scaling import scale_checkpoint
    from fairseq_gradinit.report.runs import scales_file
    from fairseq_gradinit.scales import Scales

    scales = Scales.load(scales_file(options.scales))
    count = scale_checkpoint(scales, options.checkpoint, options.out)
    print(f"{options.out}: {count} tensors multiplied by their scales")


def add_doctor(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say whether GradInit can work here",
        description=(
            "Look at the versions of what GradInit needs, and name what is known not to work. Exit "
            "status: 1 if something keeps it from working."
        ),
    )
    parser.set_defaults(run=print_findings)


def print_findings(options: Namespace) -> int:
    """Print what was found; returns 1 if there is a problem."""
    from fairseq_gradinit.cli.doctor import findings

    # While it is imported, fairseq tells of optional packages that it does without.
    logging.disable(logging.INFO)
    try:
        found = list(findings())
    finally:
        logging.disable(logging.NOTSET)
    for finding in found:
        print(f"{finding.level:7} {finding.text}")
    return int(any(finding.level == "problem" for finding in found))


SUBCOMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    add_table,
    add_heat_map,
    add_report,
    add_check,
    add_diff,
    add_apply,
    add_doctor,
)


def add_results(parser: argparse.ArgumentParser) -> None:
    """The argument of subcommands that read runs."""
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="a file that recipes append their runs to; a later run replaces an earlier like it",
    )


def add_run(parser: argparse.ArgumentParser, name: str) -> None:
    """An argument that names the scales of a run."""
    parser.add_argument(
        name, type=Path, metavar=name.upper(), help="a scales file, or the --save-dir of a run"
    )


@contextmanager
def _extra(name: str, what: str) -> Iterator[None]:
    """Turns a missing package of an extra into a sentence."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_PACKAGES:
            raise
        raise GradInitError(
            f"{error.name}, which {what} need, is not installed: run "
            f"`pip install 'fairseq-gradinit[{name}]'`"
        ) from error


@contextmanager
def _printing() -> Iterator[None]:
    """Turns standard output that takes no more, such as a full disk, into a sentence."""
    try:
        yield
        # At exit it would be too late for one.
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:
            raise
        # What is left in the buffer cannot be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise GradInitError(f"cannot print what there is to say: {error.strerror}") from error


def runs_in(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs of all files, at least one.

    Raises:
        GradInitError: there is none, or a file cannot be read.
    """
    runs = read_runs(paths)
    if not runs:
        raise GradInitError(f"there is no run in {', '.join(map(str, paths))}: train one first")
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format=f"{PROGRAM}: %(message)s")
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(PROGRAM, description="GradInit before and after training.")
    # What a mistake ends with; a subcommand whose 1 means something has another.
    parser.set_defaults(trouble=1)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in SUBCOMMANDS:
        add(subparsers)
    options = parser.parse_args(words)
    # Files in the folder where one is are what they are on every machine.
    here = f"{Path.cwd()}/"
    options.command = shlex.join([PROGRAM, *(word.removeprefix(here) for word in words)])
    try:
        with _printing():
            return int(options.run(options) or 0)
    except GradInitError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return int(options.trouble)
    except Exception:
        # A defect. Python would end with 1, which says something else where `trouble` is not 1.
        traceback.print_exc()
        return int(options.trouble)
