"""Tables and pictures of training runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from heat_map import LOSS, Panel, Point, mean_loss
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import Table

from fairseq_gradinit.results import MARGIN, RunRecord, Settings
from fairseq_gradinit.results.tables import by, ratio, seeds, spread

COLOURS = {"default": "#c0392b", "warmup": "#1b3a6b", "gradinit": "#e8a33d"}


@dataclass(frozen=True)
class Grid:
    """How runs are laid out: panels, and their rows. Columns are learning rates."""

    panel: Callable[[RunRecord], str]
    row: Callable[[RunRecord], str]
    row_label: str


def study_corpus(run: RunRecord) -> str:
    """The name that the studies give a corpus."""
    return run.recipe.partition("/")[0]


def corpus_and_model(run: RunRecord) -> str:
    return f"{study_corpus(run)}, {run.settings.model}"


def optimizer_name(found: Settings) -> str:
    """A short name, such as "adam beta2 0.98"."""
    details = re.sub(r"\(0\.9, (.*)\)", r"beta2 \1", found.optimizer_settings)
    return f"{found.optimizer} {details}"


def by_arm(runs: Sequence[RunRecord]) -> list[tuple[list[RunRecord], str]]:
    """The runs of each way to start, with its colour."""
    groups = by(runs, lambda run: run.recipe.partition("/")[2]).items()
    return [(group, COLOURS.get(name, f"C{i}")) for i, (name, group) in enumerate(groups)]


def settings_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """A row for each setting: losses on the way, scores, and what GradInit cost."""
    groups = by(runs, lambda run: (run.recipe, run.settings)).values()
    rows = [_settings_row(group) for group in groups]
    # Scores, for one, are not there in every study.
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    title = f"{LOSS.capitalize()}; mean ± standard deviation over the seeds that did not diverge"
    return [Table(title, header, [[row[name] for name in header] for row in rows])]


def _settings_row(runs: Sequence[RunRecord]) -> dict[str, str]:
    first, used = runs[0], runs[0].settings
    finished = [run for run in runs if run.status == "finished"]

    def losses_at(part: float) -> Iterator[float | None]:
        """After the last validation within this part of training."""
        for run in finished:
            known = [loss for update, loss in run.valid if update <= part * used.updates]
            yield known[-1] if known else None

    return {
        "corpus": corpus_and_model(first),
        "optimizer": optimizer_name(used),
        "peak lr": f"{used.lr:g}",
        "start": first.title,
        "warmup": str(used.warmup),
        "seeds": seeds([run.status for run in runs]),
        **{f"loss at {part:.0%}": spread(losses_at(part)) for part in (0.1, 0.2, 0.5, 1.0)},
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
        title = f"{panel.title}: {LOSS}, after the last update; mean over the seeds"
        header = [f"{grid.row_label} \\ peak lr", *(f"{rate:g}" for rate in rates)]
        rows = [
            [row, *(_cell(cells.get((row, rate), []), best) for rate in rates)]
            for row in panel.rows
        ]
        tables.append(Table(title, header, rows))
    return tables


def _lowest(panel: Panel) -> float:
    return min((p.loss for p in panel.points if p.loss is not None), default=math.inf)


def _cell(points: Sequence[Point], best: float) -> str:
    losses = [point.loss for point in points]
    diverged = losses.count(None)
    text = f"**{spread(losses)}**" if best in losses else spread(losses)
    if not diverged:
        return text
    return f"{text} ({diverged} of {len(losses)} diverged)" if text else "diverged"


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


def loss_curves(runs: Sequence[RunRecord]) -> Figure:
    """Validation loss over the updates: a panel for each model and learning rate, in two columns.

    Thick is the mean of an arm's seeds that did not diverge, thin are the seeds.
    """
    groups = by(runs, lambda run: f"{corpus_and_model(run)}, peak lr {run.settings.lr:g}")
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(5 * columns, 3.8 * rows), layout="constrained")
    for i, (title, group) in enumerate(groups.items(), 1):
        axes = figure.add_subplot(rows, columns, i)
        for part, colour in by_arm(group):
            for run in part:
                axes.plot(*zip(*run.valid, strict=True), color=colour, alpha=0.4, lw=0.8)
            curves = [run.valid for run in part if run.status == "finished"]
            means = {at[0][0]: fmean(loss for _, loss in at) for at in zip(*curves, strict=True)}
            axes.plot(list(means), list(means.values()), color=colour, lw=2, label=part[0].title)
        _label(axes, title, "update")
    return figure


def rate_curves(runs: Sequence[RunRecord]) -> Figure:
    """For one corpus: the loss after the last update, over the learning rate; x is divergence."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    plateau = runs[0].plateau
    for part, colour in by_arm(runs):
        groups = sorted(by(part, lambda run: run.settings.lr).items())
        means = [mean_loss(run.valid_loss for run in group) for _, group in groups]
        rates = [rate for rate, _ in groups]
        axes.plot(rates, means, "o-", color=colour, label=part[0].title)
        diverged = [run.settings.lr for run in part if run.valid_loss is None]
        axes.plot(diverged, [plateau] * len(diverged), "x", color=colour, alpha=0.6)
    axes.axhline(plateau, color="0.5", ls=":", label="unigram plateau")
    axes.set_xscale("log", base=2)
    rates = sorted({run.settings.lr for run in runs})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    title = f"{study_corpus(runs[0])}, {optimizer_name(runs[0].settings)}"
    _label(axes, title, "peak learning rate")
    return figure


def _label(axes: Axes, title: str, over: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(over)
    axes.set_ylabel(LOSS)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
