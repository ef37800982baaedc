"""The picture of the quickstart: training curves, and the learned scale of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fairseq_gradinit.report.figures import scale_panels
from fairseq_gradinit.scales import Scales


def save_picture(
    path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], scales: Scales
) -> None:
    """Write a PNG; `curves` has each run's (update, loss) pairs, in base 2 as fairseq logs them."""
    panels = scale_panels(scales)
    heights = [panel.height + 0.3 for panel in panels]
    width = max(panel.width for panel in panels)
    figure = Figure(figsize=(8 + width, max(4.5, sum(heights))), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(8, width))[0]
    axes = left.subplots()
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=name)
    axes.set_xlabel("update")
    axes.set_ylabel("training loss (base 2, label-smoothed)")
    axes.grid(alpha=0.3)
    axes.legend()
    grid = right.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for (axes,), panel in zip(grid, panels, strict=True):
        panel.draw(axes)
        axes.set_title(f"scales, {panel.title}", fontsize=9)
    figure.savefig(path, dpi=120)
