"""Tables and pictures of training runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from record import Table, markdown_table
from training_runs import Case, Run

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

POINTS = (0.1, 0.2, 0.5, 1.0)
"""Parts of training after which tables show the validation loss."""

MARGIN = 1.5
"""Bits below the unigram plateau that a run has to reach, see `trains`."""

LOSS = "Validation loss, base 2"


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


def by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Groups in the order in which they first appear."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def settings(case: Case) -> Case:
    """What the runs of several seeds have in common."""
    return replace(case, seed=0)


def trains(run: Run) -> bool:
    """Whether the run got MARGIN bits below the unigram plateau of its corpus."""
    return run.valid_loss is not None and run.valid_loss < run.plateau - MARGIN


def spread(values: Iterable[float | None], digits: int = 2) -> str:
    """Mean and standard deviation of those that are there."""
    found = [value for value in values if value is not None]
    if not found:
        return ""
    deviation = f" ± {stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{fmean(found):.{digits}f}{deviation}"


def mean_loss(runs: Iterable[Run]) -> float:
    """After the last update, over the runs that did not diverge; nan if all did."""
    losses = [run.valid_loss for run in runs if run.valid_loss is not None]
    return fmean(losses) if losses else math.nan


def loss_at(run: Run, part: float) -> float | None:
    """The validation loss after the last validation within this part of training."""
    known = [loss for update, loss in run.valid if update <= part * run.case.updates]
    return known[-1] if known else None


def gradinit_cost(run: Run) -> float | None:
    """GradInit's time, in updates of the run."""
    if run.gradinit_seconds is None or run.seconds_per_update is None:
        return None
    return run.gradinit_seconds / run.seconds_per_update


def source(runs: Sequence[Run], command: str) -> str:
    """Where the numbers come from: command, machines, dates, versions, revisions of the code."""

    def each(*names: str) -> str:
        found = {" ".join(str(run.circumstances[name]) for name in names) for run in runs}
        return ", ".join(sorted(found))

    days = sorted({run.circumstances["date"][:10] for run in runs})
    revisions = {
        f"{str(run.circumstances['git_revision'])[:7]}"
        f"{' with changes' if run.circumstances['git_dirty'] else ''}"
        for run in runs
    }
    return (
        f"`{command}`, {len(runs)} run{'s' if len(runs) > 1 else ''} on {each('cpu')}, one thread "
        f"each, {' to '.join(dict.fromkeys((days[0], days[-1])))}, torch {each('torch')}, "
        f"{each('fairseq')}, revision {', '.join(sorted(revisions))}"
    )


def report(tables: Iterable[Table], runs: Sequence[Run], command: str) -> str:
    """Markdown."""
    return "\n".join(markdown_table(table, source(runs, command)) for table in tables)


def settings_tables(runs: Sequence[Run]) -> list[Table]:
    """A row for each setting: losses on the way, scores, and what GradInit cost."""
    rows = [_settings_row(group) for group in by(runs, lambda run: settings(run.case)).values()]
    # Scores, for one, are not there in every study.
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    title = f"{LOSS}; mean ± standard deviation over the seeds that did not diverge"
    return [Table(title, header, [[row[name] for name in header] for row in rows])]


def _settings_row(runs: Sequence[Run]) -> dict[str, str]:
    case = runs[0].case
    finished = [run for run in runs if run.status == "finished"]
    diverged = len(runs) - len(finished)
    return {
        "corpus": f"{case.corpus}, {case.model.name}",
        "optimizer": case.optimizer.name,
        "peak lr": f"{case.lr:g}",
        "start": case.arm.title,
        "warmup": str(case.warmup),
        "seeds": f"{len(runs)}" + (f", {diverged} diverged" if diverged else ""),
        **{
            f"loss at {part:.0%}": spread(loss_at(run, part) for run in finished) for part in POINTS
        },
        "BLEU": spread((run.bleu for run in finished), 1),
        "chrF2": spread((run.chrf for run in finished), 1),
        "cost of GradInit, updates": spread(map(gradinit_cost, runs), 0),
    }


def grid_tables(runs: Sequence[Run], grid: Grid) -> list[Table]:
    """A table for each panel, the best cell bold."""
    tables = []
    for panel, part in by(runs, lambda run: grid.panel(run.case)).items():
        rows, rates, cells = _cells(part, grid)
        best = min((run.valid_loss for run in part if run.valid_loss is not None), default=math.nan)
        tables.append(
            Table(
                f"{panel}: {LOSS.lower()}, after the last update; mean over the seeds",
                [f"{grid.row_label} \\ peak lr", *(f"{rate:g}" for rate in rates)],
                [[row, *(_cell(cells.get((row, r), []), best) for r in rates)] for row in rows],
            )
        )
    return tables


def _cell(runs: Sequence[Run], best: float) -> str:
    if not runs:
        return ""
    diverged = sum(run.status == "diverged" for run in runs)
    text = spread(run.valid_loss for run in runs)
    text = f"**{text}**" if any(run.valid_loss == best for run in runs) else text
    note = "diverged" if diverged == len(runs) else f"({diverged} of {len(runs)} diverged)"
    return f"{text} {note}".strip() if diverged else text


def _cells(
    runs: Sequence[Run], grid: Grid
) -> tuple[list[str], list[float], dict[tuple[str, float], list[Run]]]:
    """Rows, columns and what stands in them."""
    rows = list(by(runs, lambda run: grid.row(run.case)))
    rates = sorted({run.case.lr for run in runs})
    return rows, rates, by(runs, lambda run: (grid.row(run.case), run.case.lr))


def share_tables(runs: Sequence[Run], grid: Grid) -> list[Table]:
    """For runs on one corpus: which share of each panel trains, then the panels themselves."""
    plateau = runs[0].plateau
    rows = []
    for panel, part in by(runs, lambda run: grid.panel(run.case)).items():
        count = sum(map(trains, part))
        share = f"{count} of {len(part)} ({count / len(part):.0%})"
        rows.append([panel, share, f"{min(map(_or_infinite, part)):.2f}"])
    title = (
        f"Share of the runs that train: validation loss below {plateau - MARGIN:.2f} at the end, "
        f"{MARGIN} bits less than the unigram plateau of {plateau:.2f}"
    )
    return [Table(title, ["", "train", "lowest loss"], rows), *grid_tables(runs, grid)]


def _or_infinite(run: Run) -> float:
    return math.inf if run.valid_loss is None else run.valid_loss


def heat_maps(runs: Sequence[Run], grid: Grid) -> Figure:
    """The panels side by side, on one scale of colours, which ends at the unigram plateau."""
    panels = by(runs, lambda run: grid.panel(run.case))
    figure = Figure(figsize=(1.5 + 4 * len(panels), 3.4), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    plateau = max(run.plateau for run in runs)
    norm = Normalize(min(plateau, *map(_or_infinite, runs)), plateau, clip=True)
    for axes, (panel, part) in zip(all_axes, panels.items(), strict=True):
        image = _heat_map(axes, part, grid, norm)
        axes.set_title(panel, fontsize=10)
    figure.colorbar(image, ax=list(all_axes), label=LOSS)
    return figure


def _heat_map(axes: Axes, runs: Sequence[Run], grid: Grid, norm: Normalize) -> Any:
    rows, rates, cells = _cells(runs, grid)
    values = [[mean_loss(cells.get((row, rate), [])) for rate in rates] for row in rows]
    image = axes.imshow(values, cmap="viridis", norm=norm, aspect="auto")
    axes.set_facecolor("0.85")
    for y, row in enumerate(rows):
        for x, rate in enumerate(rates):
            missing = "diverged" if (row, rate) in cells else ""
            value = values[y][x]
            label = missing if math.isnan(value) else f"{value:.2f}"
            dark = not math.isnan(value) and norm(value) < 0.6
            colour = "white" if dark else "black"
            axes.text(x, y, label, ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel(grid.row_label)
    return image


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
    means = {rate: mean_loss(group) for rate, group in by(runs, lambda r: r.case.lr).items()}
    rates = sorted(means)
    axes.plot(rates, [means[rate] for rate in rates], "o-", color=arm.colour, label=arm.title)
    for run in runs:
        at = run.plateau if run.valid_loss is None else run.valid_loss
        marker = "x" if run.valid_loss is None else "."
        axes.plot(run.case.lr, at, marker, color=arm.colour, alpha=0.6)
