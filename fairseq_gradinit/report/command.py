"""`fairseq-gradinit report`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fairseq_gradinit.errors import needs_plot
from fairseq_gradinit.storage import write_atomically

PAGE = "report.html"


def add_report(parser: ArgumentParser) -> None:
    """Make a parser that of `report`."""
    parser.description = (
        "Make an HTML page of one or several runs: their scales, what these did to the residual "
        "branches, the iterations and the settings. The page needs no other file."
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="the --save-dir of a run with --gradinit, or a scales file",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the page (default: {PAGE} in the run's folder, of several runs in the current one)",
    )
    parser.set_defaults(run=make_report)


def make_report(options: Namespace) -> None:
    with needs_plot("reports"):
        from fairseq_gradinit.report.page import page, read_run
    first, *others = options.runs
    beside = first if first.is_dir() else first.parent
    out = options.out or (Path(PAGE) if others else beside / PAGE)
    if out.suffix != ".html":  # Browsers go by it.
        out = out.with_name(f"{out.name}.html")
    write_atomically(out, page([read_run(path) for path in options.runs], options.command))
    print(out)
