"""The report of one or several runs: an HTML page that needs nothing beside it, and PNG figures.

Needs jinja2 and matplotlib (`pip install 'fairseq-gradinit[plot]'`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from fairseq_gradinit import __version__
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.report import figures as report_figures
from fairseq_gradinit.report.runs import Run
from fairseq_gradinit.scales import BlockScale, kinds_of_blocks
from fairseq_gradinit.storage import write_atomically


@dataclass(frozen=True)
class FigureKind:
    """A figure of the report.

    Attributes:
        name: of its PNG file.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Sequence[Run]], Figure | None]


FIGURES = (
    FigureKind(
        "scales",
        "Scales over depth",
        "The factor on every weight matrix and LayerNorm gain, by layer. What was not learned is "
        "drawn too: gains at 1, and branches of the encoder at the factor that they were given.",
        report_figures.scales_over_depth,
    ),
    FigureKind(
        "iterations",
        "Iterations",
        "The loss on a batch before the trial step and, on a batch that shares half of its "
        "sentences, after it; and the norm of the gradient. An iteration whose norm is above gamma "
        "descends the norm, the others the loss after the trial step.",
        report_figures.iterations,
    ),
    FigureKind(
        "shares",
        "Residual branches",
        "What f(x) makes up of the variance of x + f(x), before (dashed) and after: Admin's "
        "measure of how much a sublayer depends on its own branch (Liu et al., EMNLP 2020, "
        "section 4).",
        report_figures.shares_over_depth,
    ),
    FigureKind(
        "norms",
        "Weight norms",
        "The l2 norm of every weight matrix and LayerNorm gain, before (dashed) and after.",
        report_figures.norms_over_depth,
    ),
)


@dataclass(frozen=True)
class Row:
    """A row of a table with a column for each run."""

    name: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


@dataclass(frozen=True)
class Cell:
    """A cell of a table of scales; the colour is one of CSS."""

    text: str
    colour: str


@dataclass(frozen=True)
class HeatRow:
    kind: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Heat:
    """The table of a run's scales."""

    label: str
    rows: tuple[HeatRow, ...]


@dataclass(frozen=True)
class Drawn:
    """A figure as the page shows it."""

    title: str
    caption: str
    svg: Markup


def page(runs: Sequence[Run], command: str) -> str:
    """The HTML page. It loads nothing from elsewhere, and is the same for the same runs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=f"GradInit: {', '.join(run.label for run in runs)}",
        command=command,
        version=__version__,
        runs=runs,
        summary=[Row(name, tuple(map(value, runs))) for name, value in SUMMARY.items()],
        figures=list(_drawn(runs)),
        heats=[_heat(run) for run in runs],
        settings=settings_rows(runs),
    )


def save(runs: Sequence[Run], out: Path, png: Path | None, command: str) -> list[Path]:
    """Write the page and, into the folder `png` if there is one, the figures.

    Returns:
        The files, the page first.

    Raises:
        GradInitError: a file cannot be written.
    """
    write_atomically(out, page(runs, command))
    written = [out]
    if png is None:
        return written
    try:
        png.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GradInitError(f"cannot make the folder {png}: {error.strerror}") from error
    for kind in FIGURES:
        content = report_figures.render(partial(kind.draw, runs), kind.name, "png")
        if content is not None:
            written.append(png / f"{kind.name}.png")
            write_atomically(written[-1], content)
    return written


def settings_rows(runs: Sequence[Run]) -> list[Row]:
    """The settings of all runs by name; those in which they differ first."""
    settings = [run.scales.settings for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    rows = [Row(name, tuple(one.get(name, "") for one in settings)) for name in names]
    return sorted(rows, key=lambda row: not row.differs)


def _drawn(runs: Sequence[Run]) -> Iterable[Drawn]:
    for kind in FIGURES:
        content = report_figures.render(partial(kind.draw, runs), kind.name, "svg")
        if content is not None:
            # matplotlib escapes the texts that it is given.
            yield Drawn(kind.title, kind.caption, Markup(content.decode()))


# ---- The summary.


def _iterations(run: Run) -> str:
    history = run.scales.history
    if not history:
        return "not recorded"
    constraint = sum(iteration.kind == "constraint" for iteration in history)
    return f"{len(history)}" + (f", {constraint} of them for the constraint" if constraint else "")


def _loss(run: Run) -> str:
    history = run.scales.history
    return f"{history[0].loss:.3f} to {history[-1].loss:.3f}" if history else ""


def _trial_loss(run: Run) -> str:
    losses = [i.trial_loss for i in run.scales.history if i.trial_loss is not None]
    return f"{losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""


def _learned(run: Run) -> list[BlockScale]:
    return [block for block in run.scales.blocks if block.state == "learned"]


def _count(run: Run) -> str:
    return f"{len(_learned(run))} of {len(run.scales.blocks)}"


def _extreme(choose: Callable[..., BlockScale], run: Run) -> str:
    learned = _learned(run)
    if not learned:
        return ""
    block = choose(learned, key=lambda block: block.scale)
    return f"{block.scale:.3g} ({block.name})"


SUMMARY: dict[str, Callable[[Run], str]] = {
    "tensors with a learned scale": _count,
    "smallest of these scales": partial(_extreme, min),
    "largest": partial(_extreme, max),
    "iterations": _iterations,
    "loss before the trial step, first to last": _loss,
    "loss after it": _trial_loss,
    "LayerNorms centered": lambda run: "yes" if run.scales.centered else "no",
}


# ---- The table of scales.


def _heat(run: Run) -> Heat:
    rows = kinds_of_blocks(run.scales).items()
    return Heat(run.label, tuple(HeatRow(kind, tuple(map(_cell, blocks))) for kind, blocks in rows))


def _cell(block: BlockScale) -> Cell:
    reason = "" if block.state == "learned" else f" {block.state}"
    return Cell(f"{block.scale:.3g}{reason}", colour_of(block.scale))


def colour_of(scale: float) -> str:
    """Red above 1 and blue below, stronger the further away, and through it the page's own."""
    distance = math.log2(max(scale, 2.0**-9))
    strength = min(abs(distance) / 4, 1.0) * 0.7
    return f"rgba({'220, 60, 40' if distance > 0 else '50, 100, 230'}, {strength:.2f})"
