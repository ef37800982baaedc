"""`fairseq-gradinit table` and `heat-map`."""

from __future__ import annotations

import io
from argparse import ArgumentParser, Namespace
from pathlib import Path

from fairseq_gradinit.errors import needs_plot
from fairseq_gradinit.results import tables
from fairseq_gradinit.results.records import MARGIN, read_runs
from fairseq_gradinit.storage import write_atomically


def add_table(parser: ArgumentParser) -> None:
    """Make a parser that of `table`."""
    parser.description = (
        "Print a Markdown table for each corpus and model: a row for each recipe and its settings, "
        "with mean and standard deviation over the seeds."
    )
    _add_results(parser)
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


def add_heat_map(parser: ArgumentParser) -> None:
    """Make a parser that of `heat-map`."""
    parser.description = (
        "Draw validation loss over learning rate and settings of the optimizer, a panel for each "
        "recipe, and say how many of its cells train: in those every run ends at least "
        f"{MARGIN} bits below the unigram plateau of its corpus."
    )
    _add_results(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.set_defaults(run=draw_heat_map)


def draw_heat_map(options: Namespace) -> None:
    with needs_plot("heat maps"):
        from fairseq_gradinit.results import heat_map
    picture = io.BytesIO()
    heat_map.draw(heat_map.panels_of(read_runs(options.results))).savefig(picture, dpi=120)
    write_atomically(options.out, picture.getvalue())


def _add_results(parser: ArgumentParser) -> None:
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="a file that recipes append their runs to; of equal runs the last one counts",
    )
