"""Tables and pictures of training runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import Table, markdown_table
from training_runs import Case, Run

from fairseq_gradinit.results import MARGIN, Circumstances
from fairseq_gradinit.results import source as shared_source
from fairseq_gradinit.results.heat_map import LOSS, Panel, Point, draw, mean_loss
from fairseq_gradinit.results.tables import by, count, ratio, seeds, spread

POINTS = (0.1, 0.2, 0.5, 1.0)
"""Parts of training after which tables show the validation loss."""


@dataclass(frozen=True)
class Grid:
    """How runs are laid out: panels of rows and columns.

    Attributes:
        panel, row: what cases with the same one have in common.
        row_label: what `row` is. Columns are learning rates.
    """

    panel: Callable[[Case], str]
    row: Callable[[Case], str]
    row_label: str


def settings(case: Case) -> Case:
    """What the runs of several seeds have in common."""
    return replace(case, seed=0)


def loss_at(run: Run, part: float) -> float | None:
    """The validation loss after the last validation within this part of training."""
    known = [loss for update, loss in run.valid if update <= part * run.case.updates]
    return known[-1] if known else None


def source(runs: Sequence[Run], command: str) -> str:
    """Where the numbers come from: command, machines, dates, versions, revisions of the code."""
    names = {field.name for field in fields(Circumstances)}
    found = [
        Circumstances(
            **{name: value for name, value in run.circumstances.items() if name in names},
            gpus=int(run.circumstances["gpu"] is not None),
            workers=1,
        )
        for run in runs
    ]
    return shared_source(command, f"{count(runs)} of one thread each", found)


def report(tables: Iterable[Table], runs: Sequence[Run], command: str) -> str:
    """Markdown."""
    return "\n".join(markdown_table(table, source(runs, command)) for table in tables)


def settings_tables(runs: Sequence[Run]) -> list[Table]:
    """A row for each setting: losses on the way, scores, and what GradInit cost."""
    rows = [_settings_row(group) for group in by(runs, lambda run: settings(run.case)).values()]
    # Scores, for one, are not there in every study.
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    title = f"{LOSS.capitalize()}; mean ± standard deviation over the seeds that did not diverge"
    return [Table(title, header, [[row[name] for name in header] for row in rows])]


def _settings_row(runs: Sequence[Run]) -> dict[str, str]:
    case = runs[0].case
    finished = [run for run in runs if run.status == "finished"]
    return {
        "corpus": f"{case.corpus}, {case.model.name}",
        "optimizer": case.optimizer.name,
        "peak lr": f"{case.lr:g}",
        "start": case.arm.title,
        "warmup": str(case.warmup),
        "seeds": seeds([run.status for run in runs]),
        **{
            f"loss at {part:.0%}": spread(loss_at(run, part) for run in finished) for part in POINTS
        },
        "BLEU": spread((run.bleu for run in finished), 1),
        "chrF2": spread((run.chrf for run in finished), 1),
        "cost of GradInit, updates": spread(
            (ratio(run.gradinit_seconds, run.seconds_per_update) for run in runs), 0
        ),
    }


def panels(runs: Sequence[Run], grid: Grid) -> list[Panel]:
    """The runs laid out."""
    return [
        Panel(
            title,
            grid.row_label,
            [Point(grid.row(r.case), r.case.lr, r.valid_loss, r.plateau) for r in part],
        )
        for title, part in by(runs, lambda run: grid.panel(run.case)).items()
    ]


def grid_tables(runs: Sequence[Run], grid: Grid) -> list[Table]:
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


def share_tables(runs: Sequence[Run], grid: Grid) -> list[Table]:
    """For runs on one corpus: which share of each panel trains, then the panels themselves."""
    plateau = runs[0].plateau
    rows = [[panel.title, panel.share, f"{_lowest(panel):.2f}"] for panel in panels(runs, grid)]
    title = (
        f"Share of the cells that train: validation loss of all seeds at most "
        f"{plateau - MARGIN:.2f} at the end, {MARGIN} bits less than the unigram plateau of "
        f"{plateau:.2f}"
    )
    return [Table(title, ["", "share", "lowest loss"], rows), *grid_tables(runs, grid)]


def heat_maps(runs: Sequence[Run], grid: Grid) -> Figure:
    """The panels side by side, on one scale of colours, which ends at the unigram plateau."""
    return draw(panels(runs, grid))


def loss_curves(runs: Sequence[Run]) -> Figure:
    """Validation loss over the updates: a row for each model, a column for each learning rate."""
    models = by(runs, lambda run: (run.case.corpus, run.case.model))
    panels = [list(by(part, lambda run: run.case.lr).items()) for part in models.values()]
    columns = max(map(len, panels))
    figure = Figure(figsize=(5 * columns, 3.8 * len(panels)), layout="constrained")
    for all_axes, row in zip(
        figure.subplots(len(panels), columns, squeeze=False), panels, strict=True
    ):
        for axes in all_axes[len(row) :]:
            axes.set_axis_off()
        for axes, (rate, part) in zip(all_axes, row, strict=False):
            for group in by(part, lambda run: settings(run.case)).values():
                _draw_curves(axes, group)
            case = part[0].case
            axes.set_title(f"{case.corpus}, {case.model.name}, peak lr {rate:g}", fontsize=10)
            axes.set_xlabel("update")
            axes.set_ylabel(LOSS)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    return figure


def _draw_curves(axes: Axes, runs: Sequence[Run]) -> None:
    """The mean of the seeds, and thin the seeds themselves; a cross where one diverged."""
    arm = runs[0].case.arm
    for run in runs:
        # One that diverged at once is a cross at 0.
        known = {update: loss for update, loss in run.valid if loss is not None}
        known = known or {0: run.plateau}
        axes.plot(list(known), list(known.values()), color=arm.colour, alpha=0.4, lw=0.8)
        if run.status == "diverged":
            axes.plot(*list(known.items())[-1], "x", color=arm.colour)
    curves = [run.valid for run in runs if run.status == "finished"]
    means = {at[0][0]: fmean(loss for _, loss in at) for at in zip(*curves, strict=True)}
    axes.plot(list(means), list(means.values()), color=arm.colour, lw=2, label=arm.title)


def rate_curves(runs: Sequence[Run]) -> Figure:
    """Validation loss after the last update, over the learning rate; diverged runs as crosses."""
    panels = by(runs, lambda run: run.case.corpus)
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (corpus, part) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for group in by(part, lambda run: run.case.arm).values():
            _draw_rates(axes, group)
        axes.axhline(part[0].plateau, color="0.5", ls=":", label="unigram plateau")
        axes.set_xscale("log", base=2)
        rates = sorted({run.case.lr for run in part})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.set_xlabel("peak learning rate")
        axes.set_ylabel(LOSS)
        axes.set_title(f"{corpus}, {part[0].case.optimizer.name}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _draw_rates(axes: Axes, runs: Sequence[Run]) -> None:
    arm = runs[0].case.arm
    groups = by(runs, lambda run: run.case.lr)
    means = {rate: mean_loss(run.valid_loss for run in part) for rate, part in groups.items()}
    rates = sorted(means)
    axes.plot(rates, [means[rate] for rate in rates], "o-", color=arm.colour, label=arm.title)
    for run in runs:
        at = run.plateau if run.valid_loss is None else run.valid_loss
        marker = "x" if run.valid_loss is None else "."
        axes.plot(run.case.lr, at, marker, color=arm.colour, alpha=0.6)
