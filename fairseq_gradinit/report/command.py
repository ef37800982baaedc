"""`fairseq-gradinit report`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from fairseq_gradinit.errors import needs_plot

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
        help=(
            f"the page, or a folder for it; .html is added where it is missing (default: {PAGE} "
            "in the run's folder, of several runs in the current one)"
        ),
    )
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write the figures there too")
    parser.set_defaults(run=make_report)


def make_report(options: Namespace) -> None:
    """Write the page.

    Raises:
        GradInitError: a file cannot be used, or matplotlib is missing.
    """
    from fairseq_gradinit.report.runs import read_runs

    runs = read_runs(options.runs)
    with needs_plot("reports"):
        from fairseq_gradinit.report import page
    out = page_file(options.out, options.runs)
    for path in page.save(runs, out, options.png, options.command):
        print(path)


def page_file(out: Path | None, runs: Sequence[Path]) -> Path:
    """Where the page of these runs is written, if `out` is what was asked for."""
    if out is None:
        beside = runs[0] if runs[0].is_dir() else runs[0].parent
        return beside / PAGE if len(runs) == 1 else Path(PAGE)
    if out.is_dir():
        return out / PAGE
    return out if out.suffix in {".html", ".htm"} else out.with_name(f"{out.name}.html")
