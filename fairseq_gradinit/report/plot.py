"""The picture of a run: training curves, and the learned scale of every block.

Needs matplotlib (`pip install 'fairseq-gradinit[plot]'`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fairseq_gradinit.scales import BlockScale, Scales, kinds_of_blocks

Curve = Sequence[tuple[int, float]]


def save_picture(path: Path, curves: Mapping[str, Curve], scales: Scales) -> None:
    """Write a PNG with the training curves beside the scales.

    Args:
        path: the file to write.
        curves: for each run its (update, loss) pairs, losses in base 2 as fairseq logs them.
        scales: what GradInit learned.
    """
    kinds = {
        kind: blocks
        for kind, blocks in kinds_of_blocks(scales).items()
        if any(block.state == "learned" for block in blocks)
    }
    figure = Figure(figsize=(14, 2.5 + 0.23 * len(kinds)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_curves(left, curves)
    draw_scales(right, kinds)
    figure.savefig(path, dpi=120)


def draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Training loss against updates, a line for each run."""
    for name, curve in curves.items():
        axes.plot([update for update, _ in curve], [loss for _, loss in curve], label=name)
    axes.set_xlabel("update")
    axes.set_ylabel("training loss (base 2, label-smoothed)")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_scales(axes: Axes, kinds: Mapping[str, Sequence[BlockScale]]) -> None:
    """A row for each kind of block, a column for each layer; colour and number are the scale."""
    columns = max(len(blocks) for blocks in kinds.values())
    grid = [
        [math.log2(max(b.scale, 1e-3)) for b in blocks] + [math.nan] * (columns - len(blocks))
        for blocks in kinds.values()
    ]
    reach = max(1.0, max(abs(value) for row in grid for value in row if not math.isnan(value)))
    axes.imshow(grid, cmap="RdBu_r", norm=Normalize(-reach, reach), aspect="auto")
    for y, blocks in enumerate(kinds.values()):
        for x, block in enumerate(blocks):
            colour = "white" if abs(grid[y][x]) > 0.6 * reach else "black"
            label = f"{block.scale:.2f}"
            axes.text(x, y, label, ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(kinds)), list(kinds), fontsize=7)
    axes.set_xticks(range(columns), [str(layer) for layer in range(columns)])
    axes.set_xlabel("layer")
    axes.set_title("learned scales (red: larger than 1, blue: smaller)", fontsize=9)
