"""`fairseq-gradinit table`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fairseq_gradinit.results import tables
from fairseq_gradinit.results.records import read_runs


def add_table(parser: ArgumentParser) -> None:
    """Make a parser that of `table`."""
    parser.description = (
        "Print a Markdown table for each corpus and model: a row for each recipe and its settings, "
        "with mean and standard deviation over the seeds."
    )
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="a file that recipes append their runs to; of equal runs the last one counts",
    )
    parser.add_argument(
        "--published",
        type=Path,
        metavar="FILE",
        help=(
            'results of papers to show beside a recipe: a JSON array of {"corpus": '
            '"iwslt14-de-en", "recipe": "iwslt14_de_en/gradinit-adam", "metric": "BLEU", "value": '
            '..., "source": "https://..., Table ..."}; each source needs a link'
        ),
    )
    parser.set_defaults(run=print_tables)


def print_tables(options: Namespace) -> None:
    published = tables.read_published(options.published) if options.published else []
    print(tables.report(read_runs(options.results), published, options.command), end="")
