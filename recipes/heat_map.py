"""Heat maps of sweeps: validation loss over learning rate and settings of the optimizer.

    python recipes/heat_map.py RESULTS... --out FILE.png

A panel for each recipe, with how many of its cells train: in those every run ends at least
`MARGIN` bits below the unigram plateau of its corpus.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results import RunRecord, Settings, read_runs
from fairseq_gradinit.results.records import trains
from fairseq_gradinit.results.tables import by

LOSS = "validation loss, base 2"


def mean_loss(losses: Iterable[float | None]) -> float:
    """Over the runs that did not diverge; nan if all did."""
    known = [loss for loss in losses if loss is not None]
    return fmean(known) if known else math.nan


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its row and column, its last loss (None if it diverged), its plateau."""

    row: str
    lr: float
    loss: float | None
    plateau: float


@dataclass(frozen=True)
class Panel:
    """The runs of a sweep that stand in one heat map; several seeds share a cell."""

    title: str
    row_label: str
    points: Sequence[Point]

    @property
    def rows(self) -> list[str]:
        """From top to bottom."""
        return list(dict.fromkeys(point.row for point in self.points))

    @property
    def rates(self) -> list[float]:
        """The columns."""
        return sorted({point.lr for point in self.points})

    @property
    def cells(self) -> dict[tuple[str, float], list[Point]]:
        """What stands in a row and a column."""
        return by(self.points, lambda point: (point.row, point.lr))

    @property
    def share(self) -> str:
        """How many cells train: each run in them does."""
        cells = self.cells.values()
        count = sum(all(trains(point.loss, point.plateau) for point in cell) for cell in cells)
        return f"{count} of {len(cells)} train ({count / len(cells):.0%})"


def draw(panels: Sequence[Panel]) -> Figure:
    """The panels side by side, on one scale of colours, which ends at the unigram plateau."""
    figure = Figure(figsize=(1.5 + 4 * len(panels), 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    points = [point for panel in panels for point in panel.points]
    plateau = max(point.plateau for point in points)
    lowest = min((point.loss for point in points if point.loss is not None), default=plateau)
    norm = Normalize(min(plateau, lowest), plateau, clip=True)
    for axes, panel in zip(all_axes, panels, strict=True):
        image = _draw_panel(axes, panel, norm)
        axes.set_title(f"{panel.title}\n{panel.share}", fontsize=10)
    figure.colorbar(image, ax=list(all_axes), label=LOSS)
    return figure


def _draw_panel(axes: Axes, panel: Panel, norm: Normalize) -> Any:
    rows, rates, cells = panel.rows, panel.rates, panel.cells
    losses = [[[p.loss for p in cells.get((row, rate), [])] for rate in rates] for row in rows]
    means = [[mean_loss(cell) for cell in row] for row in losses]
    image = axes.imshow(means, cmap="viridis", norm=norm, aspect="auto")
    axes.set_facecolor("0.85")
    for y, row in enumerate(losses):
        for x, cell in enumerate(row):
            dark = not math.isnan(means[y][x]) and norm(means[y][x]) < 0.6
            colour = "white" if dark else "black"
            axes.text(x, y, _label(cell), ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel(panel.row_label)
    return image


def _label(losses: Sequence[float | None]) -> str:
    """What stands in a cell with runs of these losses."""
    diverged = losses.count(None)
    if diverged == len(losses):
        return "diverged" if losses else ""
    note = f"\n{diverged} of {len(losses)}\ndiverged" if diverged else ""
    return f"{mean_loss(losses):.2f}{note}"


def panels_of(runs: Sequence[RunRecord]) -> list[Panel]:
    """A panel for each recipe, and for each of its settings that is no row and no column."""

    def shared(run: RunRecord) -> tuple[str, str, Settings]:
        return run.recipe, run.corpus_digest, replace(run.settings, lr=0.0, optimizer_settings="")

    panels = []
    for (recipe, _, settings), group in by(runs, shared).items():
        points = [
            Point(run.settings.optimizer_settings, run.settings.lr, run.valid_loss, run.plateau)
            for run in group
        ]
        points.sort(key=lambda point: point.row)
        title = f"{recipe}, warmup {settings.warmup}"
        panels.append(Panel(title, f"settings of {settings.optimizer}", points))
    return panels


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="files of records of runs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    options = parser.parse_args(arguments)
    try:
        draw(panels_of(read_runs(options.results))).savefig(options.out, format="png", dpi=120)
    except (GradInitError, OSError) as error:
        print(f"heat_map: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
