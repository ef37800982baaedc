"""The figures of a report: each shows one thing of several runs, side by side.

Needs matplotlib (`pip install 'fairseq-gradinit[plot]'`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fairseq_gradinit.report.runs import Run
from fairseq_gradinit.scales import Change

COLOURS = [f"C{i}" for i in range(10)]
MARKERS = "os^DvPX*"
INK = "#0a0b0c"
"""Stands for the colour of the page's text in what matplotlib draws."""

_LAYER = re.compile(r"(?P<stack>(?:.*\.)?[^.\d]+)\.(?P<layer>\d+)\.(?P<kind>.+)")


@dataclass(frozen=True)
class Line:
    """One kind of tensor over the layers of a stack, such as fc1.weight of encoder.layers.

    Attributes:
        points: (layer, value); a value that is not known is left out.
    """

    stack: str
    kind: str
    points: tuple[tuple[int, float], ...]


def lines_of(values: Sequence[tuple[str, float | None]]) -> list[Line]:
    """What tensors of these names and values make; biases and single tensors make no line."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for name, value in values:
        match = _LAYER.fullmatch(name)
        if match and value is not None and "bias" not in name.rpartition(".")[2]:
            place = match["stack"], match["kind"]
            found.setdefault(place, []).append((int(match["layer"]), value))
    return [Line(stack, kind, tuple(points)) for (stack, kind), points in found.items()]


# ---- The figures.


def scales_over_depth(runs: Sequence[Run]) -> Figure | None:
    """The scale of every weight by layer and kind; None if no run has layers."""
    return _over_depth(
        runs,
        lambda run: [([(b.name, b.scale) for b in run.scales.blocks], "-")],
        "scale",
    )


def norms_over_depth(runs: Sequence[Run]) -> Figure | None:
    """The l2 norm of every weight before (dashed) and after; None if no run has a record of it."""
    return _over_depth(runs, lambda run: _before_and_after(run.norms), "l2 norm")


def shares_over_depth(runs: Sequence[Run]) -> Figure | None:
    """The share of every branch before (dashed) and after; None if no run has a record of it."""
    return _over_depth(runs, lambda run: _before_and_after(run.shares), "share of the variance")


def iterations(runs: Sequence[Run]) -> Figure | None:
    """Loss and gradient norm over the iterations; None if no run has a record of them."""
    runs = [run for run in runs if run.scales.history]
    if not runs:
        return None
    figure, grid = _panels(2, len(runs))
    for run, (losses, norms) in zip(runs, zip(*grid, strict=True), strict=True):
        losses.set_title(_plain(run.label), fontsize=9)
        _draw_losses(losses, run)
        _draw_gradient_norms(norms, run)
    grid[0][0].set_ylabel("loss, nats per unit of sample size")
    grid[1][0].set_ylabel("gradient norm")
    return figure


def _draw_losses(axes: Axes, run: Run) -> None:
    history = run.scales.history
    axes.plot([i.index for i in history], [i.loss for i in history], label="before the trial step")
    trials = [(i.index, i.trial_loss) for i in history if i.trial_loss is not None]
    if trials:
        axes.plot(*zip(*trials, strict=True), label="after it, on the other batch")
    axes.legend(fontsize=8)


def _draw_gradient_norms(axes: Axes, run: Run) -> None:
    history = run.scales.history
    axes.plot([i.index for i in history], [i.grad_norm for i in history], color="0.5", lw=0.8)
    for kind, colour in (("objective", "C0"), ("constraint", "C3")):
        points = [(i.index, i.grad_norm) for i in history if i.kind == kind]
        if points:
            axes.plot(*zip(*points, strict=True), ".", color=colour, label=f"{kind} iteration")
    if run.gamma is not None:
        axes.axhline(run.gamma, color="C1", ls="--", label=f"gamma = {run.gamma:g}")
    axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.legend(fontsize=8)


Curves = Sequence[tuple[Sequence[tuple[str, float | None]], str]]
"""Values by the names of tensors, and the style of their lines."""


def _before_and_after(changes: Sequence[Change]) -> Curves:
    before = [(change.name, change.before) for change in changes]
    return [(before, "--"), ([(change.name, change.after) for change in changes], "-")]


def _over_depth(
    runs: Sequence[Run], curves_of: Callable[[Run], Curves], ylabel: str
) -> Figure | None:
    """A column for each run and a row for each of the stacks of layers that there are."""
    drawn = {
        run.label: [(line, style) for values, style in curves_of(run) for line in lines_of(values)]
        for run in runs
    }
    lines = [line for curves in drawn.values() for line, _ in curves]
    if not lines:
        return None
    stacks = list(dict.fromkeys(line.stack for line in lines))
    looks = _looks(lines)
    figure, grid = _panels(len(stacks), len(drawn))
    for (label, curves), column in zip(drawn.items(), zip(*grid, strict=True), strict=True):
        column[0].set_title(_plain(label), fontsize=9)
        for stack, axes in zip(stacks, column, strict=True):
            for line, style in (one for one in curves if one[0].stack == stack):
                _draw_line(axes, line, style, looks)
        column[-1].set_xlabel("layer")
    for stack, (first, *_) in zip(stacks, grid, strict=True):
        first.set_ylabel(f"{_plain(stack)}\n{ylabel}")
        values = [value for line in lines if line.stack == stack for _, value in line.points]
        # What is zero has no place on a logarithmic axis.
        first.set_yscale("log") if min(values) > 0 else first.set_yscale("symlog", linthresh=1e-3)
    legends = [axes.get_legend_handles_labels() for row in grid for axes in row]
    handles = {text: line for legend in legends for line, text in zip(*legend, strict=True)}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=8
    )
    return figure


def _draw_line(axes: Axes, line: Line, style: str, looks: dict[str, tuple[str, str]]) -> None:
    colour, marker = looks[line.kind]
    layers, values = zip(*line.points, strict=True)
    hollow: dict[str, Any] = {"markerfacecolor": "none", "alpha": 0.6} if style == "--" else {}
    label = None if style == "--" else _plain(line.kind)
    axes.plot(layers, values, style, color=colour, marker=marker, ms=5, label=label, **hollow)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plain(text: str) -> str:
    """Dollar signs would begin a formula."""
    return text.replace("$", r"\$")


def _looks(lines: Sequence[Line]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each kind: those of one sublayer have a colour in common."""
    members: dict[str, list[str]] = {}
    for kind in dict.fromkeys(line.kind for line in lines):
        members.setdefault(kind.partition(".")[0], []).append(kind)
    return {
        kind: (COLOURS[i % len(COLOURS)], MARKERS[j % len(MARKERS)])
        for i, kinds in enumerate(members.values())
        for j, kind in enumerate(kinds)
    }


def _panels(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(1.5 + 4.5 * columns, 1 + 2.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    return figure, grid.tolist()


# ---- As files.


def render(
    draw: Callable[[], Figure | None], name: str, format_: Literal["svg", "png"]
) -> bytes | None:
    """What `draw` draws: a PNG on white, or an SVG without background in the page's colour.

    The same figures give the same bytes.

    Args:
        name: tells the parts of an SVG from those of others in one page.
    """
    ink = "black" if format_ == "png" else INK
    style: dict[str, Any] = {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), ink),
        **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor"), ink),
        **{"svg.fonttype": "none", "svg.hashsalt": name},
        "legend.framealpha": 0.0,
    }
    if format_ == "svg":
        style |= dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none")
    with matplotlib.rc_context(cast(Any, style)):
        figure = draw()
        if figure is None:
            return None
        picture = io.BytesIO()
        metadata = {"Date": None} if format_ == "svg" else {"Software": None}
        figure.savefig(picture, format=format_, dpi=120, metadata=metadata)
    content = picture.getvalue()
    if format_ == "png":
        return content
    return content[content.index(b"<svg") :].replace(INK.encode(), b"currentColor")
