"""Tables and pictures of training runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import Table, markdown_table

from fairseq_gradinit.results import MARGIN, RunRecord, Settings
from fairseq_gradinit.results import source as shared_source
from fairseq_gradinit.results.heat_map import LOSS, Panel, Point, draw, mean_loss
from fairseq_gradinit.results.tables import by, count, ratio, seeds, spread

POINTS = (0.1, 0.2, 0.5, 1.0)
"""Parts of training after which tables show the validation loss."""


COLOURS = {"default": "#c0392b", "warmup": "#1b3a6b", "gradinit": "#e8a33d"}


@dataclass(frozen=True)
class Grid:
    """How runs are laid out: panels of rows and columns.

    Attributes:
        panel, row: what runs with the same one have in common.
        row_label: what `row` is. Columns are learning rates.
    """

    panel: Callable[[RunRecord], str]
    row: Callable[[RunRecord], str]
    row_label: str


def settings(run: RunRecord) -> tuple[str, Settings]:
    """What the runs of several seeds have in common."""
    return run.recipe, run.settings


def study_corpus(run: RunRecord) -> str:
    """The name that the studies give a corpus."""
    return run.recipe.partition("/")[0]


def optimizer_name(found: Settings) -> str:
    """A short name, such as "adam beta2 0.98"."""
    details = re.sub(r"\(0\.9, (.*)\)", r"beta2 \1", found.optimizer_settings)
    return f"{found.optimizer} {details}"


def colours(runs: Iterable[RunRecord]) -> dict[str, str]:
    """Of arms: those of the three usual ones, and matplotlib's one after the other."""
    others = cycle(f"C{i}" for i in range(10))
    return {name: COLOURS.get(name) or next(others) for name in dict.fromkeys(map(arm, runs))}


def arm(run: RunRecord) -> str:
    """How training started."""
    return run.recipe.partition("/")[2]


def loss_at(run: RunRecord, part: float) -> float | None:
    """The validation loss after the last validation within this part of training."""
    known = [loss for update, loss in run.valid if update <= part * run.settings.updates]
    return known[-1] if known else None


def source(runs: Sequence[RunRecord], command: str) -> str:
    """Where the numbers come from: command, machines, dates, versions, revisions of the code."""
    found = [run.circumstances for run in runs]
    return shared_source(command, f"{count(runs)} of one thread each", found)


def report(tables: Iterable[Table], runs: Sequence[RunRecord], command: str) -> str:
    """Markdown."""
    return "\n".join(markdown_table(table, source(runs, command)) for table in tables)


def settings_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """A row for each setting: losses on the way, scores, and what GradInit cost."""
    rows = [_settings_row(group) for group in by(runs, settings).values()]
    # Scores, for one, are not there in every study.
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    title = f"{LOSS.capitalize()}; mean ± standard deviation over the seeds that did not diverge"
    return [Table(title, header, [[row[name] for name in header] for row in rows])]


def _settings_row(runs: Sequence[RunRecord]) -> dict[str, str]:
    first, used = runs[0], runs[0].settings
    finished = [run for run in runs if run.status == "finished"]
    return {
        "corpus": f"{study_corpus(first)}, {used.model}",
        "optimizer": optimizer_name(used),
        "peak lr": f"{used.lr:g}",
        "start": first.title,
        "warmup": str(used.warmup),
        "seeds": seeds([run.status for run in runs]),
        **{
            f"loss at {part:.0%}": spread(loss_at(run, part) for run in finished) for part in POINTS
        },
        "BLEU": spread((part.bleu for run in finished for part in run.scores), 1),
        "chrF2": spread((part.chrf for run in finished for part in run.scores), 1),
        "cost of GradInit, updates": spread(
            (ratio(run.gradinit_seconds, run.seconds_per_update) for run in runs), 0
        ),
    }


def panels(runs: Sequence[RunRecord], grid: Grid) -> list[Panel]:
    """The runs laid out."""
    return [
        Panel(
            title,
            grid.row_label,
            [Point(grid.row(r), r.settings.lr, r.valid_loss, r.plateau) for r in part],
        )
        for title, part in by(runs, grid.panel).items()
    ]


def grid_tables(runs: Sequence[RunRecord], grid: Grid) -> list[Table]:
    """A table for each panel, the best cell bold."""
    tables = []
    for panel in panels(runs, grid):
        rates, cells, best = panel.rates, panel.cells, _lowest(panel)
        tables.append(
            Table(
                f"{panel.title}: {LOSS}, after the last update; mean over the seeds",
                [f"{grid.row_label} \\ peak lr", *(f"{rate:g}" for rate in rates)],
                [
                    [r, *(_cell(cells.get((r, rate), []), best) for rate in rates)]
                    for r in panel.rows
                ],
            )
        )
    return tables


def _lowest(panel: Panel) -> float:
    return min((p.loss for p in panel.points if p.loss is not None), default=math.inf)


def _cell(points: Sequence[Point], best: float) -> str:
    losses = [point.loss for point in points]
    diverged = losses.count(None)
    text = spread(losses)
    text = f"**{text}**" if best in losses else text
    note = "diverged" if diverged == len(losses) else f"({diverged} of {len(losses)} diverged)"
    return f"{text} {note}".strip() if diverged else text


def share_tables(runs: Sequence[RunRecord], grid: Grid) -> list[Table]:
    """For runs on one corpus: which share of each panel trains, then the panels themselves."""
    plateau = runs[0].plateau
    rows = [[panel.title, panel.share, f"{_lowest(panel):.2f}"] for panel in panels(runs, grid)]
    title = (
        f"Share of the cells that train: validation loss of all seeds at most "
        f"{plateau - MARGIN:.2f} at the end, {MARGIN} bits less than the unigram plateau of "
        f"{plateau:.2f}"
    )
    return [Table(title, ["", "share", "lowest loss"], rows), *grid_tables(runs, grid)]


def heat_maps(runs: Sequence[RunRecord], grid: Grid) -> Figure:
    """The panels side by side, on one scale of colours, which ends at the unigram plateau."""
    return draw(panels(runs, grid))


def loss_curves(runs: Sequence[RunRecord]) -> Figure:
    """Validation loss over the updates: a row for each model, a column for each learning rate."""
    models = by(runs, lambda run: (study_corpus(run), run.settings.model))
    panels = [list(by(part, lambda run: run.settings.lr).items()) for part in models.values()]
    columns, palette = max(map(len, panels)), colours(runs)
    figure = Figure(figsize=(5 * columns, 3.8 * len(panels)), layout="constrained")
    for all_axes, row in zip(
        figure.subplots(len(panels), columns, squeeze=False), panels, strict=True
    ):
        for axes in all_axes[len(row) :]:
            axes.set_axis_off()
        for axes, (rate, part) in zip(all_axes, row, strict=False):
            for group in by(part, settings).values():
                _draw_curves(axes, group, palette[arm(group[0])])
            name = f"{study_corpus(part[0])}, {part[0].settings.model}"
            axes.set_title(f"{name}, peak lr {rate:g}", fontsize=10)
            axes.set_xlabel("update")
            axes.set_ylabel(LOSS)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    return figure


def _draw_curves(axes: Axes, runs: Sequence[RunRecord], colour: str) -> None:
    """The mean of the seeds, and thin the seeds themselves; a cross where one diverged."""
    for run in runs:
        # One that diverged at once is a cross at 0.
        known = {update: loss for update, loss in run.valid if loss is not None}
        known = known or {0: run.plateau}
        axes.plot(list(known), list(known.values()), color=colour, alpha=0.4, lw=0.8)
        if run.status == "diverged":
            axes.plot(*list(known.items())[-1], "x", color=colour)
    curves = [run.valid for run in runs if run.status == "finished"]
    means = {at[0][0]: fmean(loss for _, loss in at) for at in zip(*curves, strict=True)}
    axes.plot(list(means), list(means.values()), color=colour, lw=2, label=runs[0].title)


def rate_curves(runs: Sequence[RunRecord]) -> Figure:
    """Validation loss after the last update, over the learning rate; diverged runs as crosses."""
    panels, palette = by(runs, study_corpus), colours(runs)
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (corpus, part) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for group in by(part, arm).values():
            _draw_rates(axes, group, palette[arm(group[0])])
        axes.axhline(part[0].plateau, color="0.5", ls=":", label="unigram plateau")
        axes.set_xscale("log", base=2)
        rates = sorted({run.settings.lr for run in part})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel(LOSS)
        axes.set_title(f"{corpus}, {optimizer_name(part[0].settings)}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _draw_rates(axes: Axes, runs: Sequence[RunRecord], colour: str) -> None:
    groups = by(runs, lambda run: run.settings.lr)
    means = {rate: mean_loss(run.valid_loss for run in part) for rate, part in groups.items()}
    rates = sorted(means)
    axes.plot(rates, [means[rate] for rate in rates], "o-", color=colour, label=runs[0].title)
    for run in runs:
        at = run.plateau if run.valid_loss is None else run.valid_loss
        marker = "x" if run.valid_loss is None else "."
        axes.plot(run.settings.lr, at, marker, color=colour, alpha=0.6)
