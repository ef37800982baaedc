"""Heat maps of sweeps: validation loss over learning rate and another setting.

Needs matplotlib (`pip install 'fairseq-gradinit[plot]'`).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results.records import RunRecord, trains
from fairseq_gradinit.results.tables import by
from fairseq_gradinit.storage import write_atomically

LOSS = "validation loss, base 2"


def mean_loss(losses: Iterable[float | None]) -> float:
    """Over the runs that did not diverge; nan if all did."""
    known = [loss for loss in losses if loss is not None]
    return fmean(known) if known else math.nan


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        row: what it has in common with others at other learning rates.
        lr: the peak learning rate, its column.
        loss: after the last update; None if it diverged.
        plateau: the unigram plateau of its corpus.
    """

    row: str
    lr: float
    loss: float | None
    plateau: float


@dataclass(frozen=True)
class Panel:
    """The runs of a sweep that stand in one heat map; several seeds share a cell.

    Attributes:
        row_label: what the rows are.
    """

    title: str
    row_label: str
    points: Sequence[Point]

    @property
    def rows(self) -> list[str]:
        """From top to bottom, in the order of the points."""
        return list(by(self.points, lambda point: point.row))

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
        """How many cells train, which is to say that each run in them does."""
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
            axes.text(x, y, label(cell), ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel(panel.row_label)
    return image


def label(losses: Sequence[float | None]) -> str:
    """What stands in a cell with runs of these losses."""
    diverged = losses.count(None)
    if not losses:
        return ""
    if diverged == len(losses):
        return "diverged"
    note = f"\n{diverged} of {len(losses)}\ndiverged" if diverged else ""
    return f"{mean_loss(losses):.2f}{note}"


# ---- From records.

# What a number in the settings of an optimizer is.
ROWS = {
    "beta2": re.compile(r"\(\s*[\d.e-]+\s*,\s*([\d.e-]+)\s*\)"),
    "momentum": re.compile(r"momentum\s+([\d.e-]+)"),
}


def panels_of(runs: Sequence[RunRecord]) -> list[Panel]:
    """A panel for each recipe, and for each of its settings that is no row and no column."""
    groups = list(by(runs, _panel_key).values())
    return [_panel(_title(group[-1], [other[-1] for other in groups]), group) for group in groups]


def _panel_key(run: RunRecord) -> Hashable:
    others = replace(run.settings, lr=0.0, optimizer_settings="")
    return run.recipe, run.corpus_digest, others


def _title(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """The run's, with what tells it from other panels of this title."""
    features = _features(run)
    beside = [_features(other) for other in runs if other.title == run.title]
    different = [f for f, *all_ in zip(features, *beside, strict=True) if len(set(all_)) > 1]
    return ", ".join([run.title, *different])


def _features(run: RunRecord) -> tuple[str, ...]:
    settings = run.settings
    return (
        *(run.corpus, run.corpus_digest[:7], settings.model, settings.optimizer),
        *(f"warmup {settings.warmup}", f"{settings.updates} updates"),
        f"{settings.tokens_per_batch} tokens",
    )


def _panel(title: str, runs: Sequence[RunRecord]) -> Panel:
    row_label, rows = _rows({run.settings.optimizer_settings for run in runs})
    order = list(rows)
    points = [
        Point(
            rows[run.settings.optimizer_settings],
            run.settings.lr,
            run.valid_loss if run.status == "finished" else None,
            run.plateau,
        )
        for run in sorted(runs, key=lambda run: order.index(run.settings.optimizer_settings))
    ]
    return Panel(title, row_label, points)


def _rows(settings: Collection[str]) -> tuple[str, dict[str, str]]:
    """What the rows are, and for each settings of the optimizer its row, from top to bottom."""
    for row_label, pattern in ROWS.items():
        found = {text: match[1] for text in settings if (match := pattern.fullmatch(text))}
        if len(set(found.values())) == len(settings):
            return row_label, dict(sorted(found.items(), key=lambda item: float(item[1])))
    return "optimizer", {text: text for text in sorted(settings)}


def save(figure: Figure, path: Path) -> None:
    """Write a picture; its format is what the name ends with.

    Raises:
        GradInitError: there is no such format, or the file cannot be written.
    """
    suffix, known = path.suffix.lstrip("."), figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise GradInitError(f"cannot write {path}: let its name end in .{', .'.join(known)}")
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix, dpi=120)
    write_atomically(path, picture.getvalue())
