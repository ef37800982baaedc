"""The program `fairseq-gradinit`: what came of training runs, shown.

A subcommand is a function that adds its parser to the others, with what it does as the default of
`run`, and stands in SUBCOMMANDS. What takes long to import is imported by what it does.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fairseq_gradinit import check
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
            '"iwslt14-de-en", "recipe": "iwslt14-de-en/gradinit-adam", "metric": "BLEU", "value": '
            '..., "source": "https://..., Table ..."}; a source must have a link'
        ),
    )
    parser.set_defaults(run=print_tables)


def print_tables(options: Namespace) -> None:
    """Print the tables.

    Raises:
        GradInitError: a file cannot be used.
    """
    from fairseq_gradinit import tables

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
        from fairseq_gradinit import heat_map
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
    from fairseq_gradinit import report_runs

    runs = report_runs.read_runs(options.runs)
    with _extra("plot", "reports"):
        from fairseq_gradinit import report
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
    parser.set_defaults(run=partial(run_check, parser))


def run_check(parser: argparse.ArgumentParser, options: Namespace) -> NoReturn:
    """Make the check, and leave with its exit status."""
    try:
        status = check.run(options)
    except GradInitError as error:
        parser.exit(2, f"{PROGRAM}: {error}\n")
    parser.exit(status)


SUBCOMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    add_table,
    add_heat_map,
    add_report,
    add_check,
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
    parser = argparse.ArgumentParser(PROGRAM, description="What came of training runs, shown.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in SUBCOMMANDS:
        add(subparsers)
    options = parser.parse_args(words)
    # Files in the folder where one is are what they are on every machine.
    here = f"{Path.cwd()}/"
    options.command = shlex.join([PROGRAM, *(word.removeprefix(here) for word in words)])
    try:
        options.run(options)
    except GradInitError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0
