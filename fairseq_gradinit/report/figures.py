"""The figures of a report, as small panels that remain legible on a narrow screen.

Needs matplotlib (`pip install 'fairseq-gradinit[plot]'`).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fairseq_gradinit.scales import BlockScale, Change, Scales

COLOURS = ("#3d85c6", "#e07b1a", "#1f9e89", "#b5559b", "#8a8a8a")
"""Visible on white and on black, and told apart by the colour-blind."""
MARKERS = "os^DvPX*"
INK = "#0a0b0c"
"""In an SVG it is replaced by the colour of the page's text."""
LEAST_SHARE = 1e-9
"""Shares below it are drawn there: a logarithmic axis has no place for zero."""

CELL = 0.36, 0.2
"""Of a heat map, in inches."""
OUTSIDE = "outside the layers"

_LAYER = re.compile(r"(?P<stack>(?:.*\.)?[^.\d]+)\.(?P<layer>\d+)\.(?P<kind>.+)")


@dataclass(frozen=True)
class Run:
    """What a run saved; `shares` are those of its effect file, if there is one, see `Effect`."""

    label: str
    scales: Scales
    shares: Sequence[Change] = ()


@dataclass(frozen=True)
class Panel:
    """One picture of a figure, of one run; sizes are in inches."""

    run: str
    title: str
    draw: Callable[[Axes], None]
    width: float = 4.2
    height: float = 2.9


Stack = dict[str, dict[int, Any]]
"""For each kind of tensor or branch, such as fc1.weight, what there is of it by layer."""


def stacks_of(items: Iterable[BlockScale | Change]) -> dict[str, Stack]:
    """Items by stack of layers, such as encoder.layers; those outside come last, under ""."""
    found: dict[str, Stack] = {}
    for item in items:
        match = _LAYER.fullmatch(item.name)
        stack, layer, kind = match.groups() if match else ("", 0, item.name)
        found.setdefault(stack, {}).setdefault(kind, {})[int(layer)] = item
    return dict(sorted(found.items(), key=lambda entry: not entry[0]))


# ---- The figures: those of one run follow each other.


def scales(runs: Sequence[Run]) -> list[Panel]:
    """A heat map for each run and stack: kinds of tensors down, layers across.

    Kinds of which no tensor was changed are left out.
    """
    panels = []
    stacks = [(run.label, *item) for run in runs for item in stacks_of(run.scales.blocks).items()]
    for label, stack, kinds in stacks:
        changed = {
            kind: blocks
            for kind, blocks in kinds.items()
            if any(b.state == "learned" or b.scale != 1 for b in blocks.values())
        }
        if changed:
            columns = max(2, len({layer for blocks in changed.values() for layer in blocks}))
            width = 0.3 + 0.07 * max(map(len, changed)) + CELL[0] * columns
            height = 0.5 + CELL[1] * len(changed)
            draw = partial(_draw_scales, changed)
            panels.append(Panel(label, stack or OUTSIDE, draw, width, height))
    return panels


def branches(runs: Sequence[Run]) -> list[Panel]:
    """For each run and stack, the share of every branch before (dashed) and after."""
    shares = [change for run in runs for change in run.shares]
    values = [v for change in shares for v in (change.before, change.after) if v is not None]
    if not values:
        return []
    stacks = [(run, *item) for run in runs for item in stacks_of(run.shares).items()]
    order = list(dict.fromkeys(kind for _, _, kinds in stacks for kind in kinds))
    limits = max(min(values), LEAST_SHARE) / 2, min(2 * max(values), 1.5)
    draw = partial(_draw_branches, order, limits)
    return [Panel(run.label, stack or OUTSIDE, partial(draw, k)) for run, stack, k in stacks]


def iterations(runs: Sequence[Run]) -> list[Panel]:
    """For each run its losses and, if the gradient norm was bounded, that norm."""
    panels = []
    for run in (run for run in runs if run.scales.history):
        panels.append(Panel(run.label, "loss", partial(_draw_losses, run.scales)))
        gamma = run.scales.settings.get("gamma", "off")
        if gamma != "off":
            draw = partial(_draw_norms, run.scales, float(gamma))
            panels.append(Panel(run.label, "norm of the gradient", draw))
    return panels


def _draw_scales(rows: Stack, axes: Axes) -> None:
    layers = sorted({layer for blocks in rows.values() for layer in blocks})
    grid = [
        [math.log2(max(blocks[i].scale, 1e-3)) if i in blocks else math.nan for i in layers]
        for blocks in rows.values()
    ]
    # The same colours in all runs; beyond a factor of 4 the number tells.
    axes.pcolormesh(grid, cmap="RdBu_r", norm=Normalize(-2, 2, clip=True))
    for y, blocks in enumerate(rows.values()):
        for layer, block in blocks.items():
            x = layers.index(layer)
            colour = "white" if abs(grid[y][x]) > 1.2 else "black"
            style = "normal" if block.state == "learned" else "italic"
            text = axes.text(x + 0.5, y + 0.5, f"{block.scale:.2f}", ha="center", va="center")
            text.set(fontsize=7, color=colour, style=style)
    axes.invert_yaxis()
    names = [kind.removesuffix(".weight") for kind in rows]
    axes.set_yticks([y + 0.5 for y in range(len(rows))], names, fontsize=8)
    axes.set_xticks([x + 0.5 for x in range(len(layers))], map(str, layers), fontsize=8)
    axes.tick_params(length=0)
    axes.set_box_aspect(CELL[1] * len(rows) / (CELL[0] * max(2, len(layers))))
    axes.set_anchor("N")
    if len(layers) > 1:
        axes.set_xlabel("layer", fontsize=8)
    else:
        axes.set_xticks([])


def _draw_branches(
    order: Sequence[str], limits: tuple[float, float], kinds: Stack, axes: Axes
) -> None:
    for kind, changes in kinds.items():
        i = order.index(kind)
        plot = partial(axes.plot, c=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])
        plot(*_points({n: c.before for n, c in changes.items()}), ls="--", mfc="none", alpha=0.7)
        plot(*_points({n: c.after for n, c in changes.items()}), label=kind)
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, "layer", "share of the variance")


def _points(shares: Mapping[int, float | None]) -> tuple[list[int], list[float]]:
    known = {layer: max(share, LEAST_SHARE) for layer, share in shares.items() if share is not None}
    return list(known), list(known.values())


def _draw_losses(of: Scales, axes: Axes) -> None:
    history = of.history
    trials = [(i.index, i.trial_loss) for i in history if i.trial_loss is not None]
    losses = [(i.index, i.loss) for i in history]
    curves = {"before the trial step": losses, "after it": trials}
    for (label, curve), colour, style in zip(curves.items(), COLOURS, ("-", "--"), strict=False):
        if curve:
            axes.plot(*zip(*curve, strict=True), style, c=colour, label=label)
    _label(axes, "iteration", "loss, nats")


def _draw_norms(of: Scales, gamma: float, axes: Axes) -> None:
    for kind, colour, marker in zip(("objective", "constraint"), COLOURS, MARKERS, strict=False):
        points = [(i.index, i.grad_norm) for i in of.history if i.kind == kind]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, ms=3, label=kind)
    axes.axhline(gamma, color=COLOURS[-1], ls="--", label=f"gamma {gamma:g}")
    axes.set_yscale("log")
    _label(axes, "iteration", "norm of the gradient")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=8, frameon=False)


def figure_of(panel: Panel) -> Figure:
    figure = Figure(figsize=(panel.width, panel.height))
    # Room for browsers, whose letters may be wider than matplotlib's.
    figure.set_layout_engine("constrained", w_pad=0.15)
    panel.draw(figure.subplots())
    return figure


def render(panel: Panel, name: str) -> str:
    """An SVG without background in the page's colour; `name` tells its parts from others'."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        **dict.fromkeys((*inked, "legend.labelcolor"), INK),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
        **{"svg.fonttype": "none", "svg.hashsalt": name},
    }
    with matplotlib.rc_context(style):
        picture = io.StringIO()
        figure_of(panel).savefig(picture, format="svg", metadata={"Date": None})
    content = picture.getvalue()
    return content[content.index("<svg") :].replace(INK, "currentColor")


def save_picture(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], of: Scales) -> None:
    """Write the quickstart's PNG: each run's (update, loss) in base 2, and the learned scales."""
    panels = scales([Run("", of)])
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
