"""The picture of a run: training curves, and the learned scale of every block.

Needs matplotlib (`pip install 'fairseq-gradinit[plot]'`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fairseq_gradinit.report.figures import scale_panels
from fairseq_gradinit.scales import Scales

Curve = Sequence[tuple[int, float]]


def save_picture(path: Path, curves: Mapping[str, Curve], scales: Scales) -> None:
    """Write a PNG with the training curves beside the scales.

    Args:
        path: the file to write.
        curves: for each run its (update, loss) pairs, losses in base 2 as fairseq logs them.
        scales: what GradInit learned.
    """
    panels = scale_panels(scales)
    heights = [panel.height + 0.3 for panel in panels]
    width = max(panel.width for panel in panels)
    figure = Figure(figsize=(8 + width, max(4.5, sum(heights))), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(8, width))[0]
    draw_curves(left.subplots(), curves)
    grid = right.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for (axes,), panel in zip(grid, panels, strict=True):
        panel.draw(axes)
        axes.set_title(f"scales, {panel.title}", fontsize=9)
    figure.savefig(path, dpi=120)


def draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Training loss against updates, a line for each run."""
    for name, curve in curves.items():
        axes.plot([update for update, _ in curve], [loss for _, loss in curve], label=name)
    axes.set_xlabel("update")
    axes.set_ylabel("training loss (base 2, label-smoothed)")
    axes.grid(alpha=0.3)
    axes.legend()
