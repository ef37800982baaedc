"""The report of one or several runs: an HTML page that needs nothing beside it, and PNG figures.

Needs jinja2 and matplotlib (`pip install 'fairseq-gradinit[plot]'`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import jinja2
from markupsafe import Markup

from fairseq_gradinit import __version__
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.report import figures
from fairseq_gradinit.report.figures import Panel
from fairseq_gradinit.report.runs import Run
from fairseq_gradinit.scales import BlockScale
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
    panels: Callable[[Sequence[Run]], list[Panel]]


FIGURES = (
    FigureKind(
        "scales",
        "Scales",
        "The factor on every tensor, by kind and layer: red is larger than 1, blue smaller. In "
        "italics: given, not learned. Kinds of tensors that kept their values are left out.",
        figures.scales,
    ),
    FigureKind(
        "branches",
        "Residual branches",
        "What f(x) makes up of the variance of x + f(x), before (dashed) and after: how much a "
        "sublayer depends on its own branch (Liu et al., EMNLP 2020, section 4).",
        figures.branches,
    ),
    FigureKind(
        "iterations",
        "Iterations",
        "The loss on a batch before the trial step, and on another batch, which shares half of "
        "its sentences, after it. Where the norm of the gradient is bounded by gamma, an iteration "
        "above the bound descends the norm instead of the loss.",
        figures.iterations,
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
class Drawn:
    """A figure as the page shows it: for each run its panels and their pictures."""

    title: str
    caption: str
    rows: dict[str, list[tuple[Panel, Markup]]]


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
        figures=[_drawn(kind, panels) for kind, panels in _figures(runs)],
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
    for kind, panels in _figures(runs):
        written.append(png / f"{kind.name}.png")
        write_atomically(written[-1], figures.render(panels, kind.name, "png"))
    return written


def settings_rows(runs: Sequence[Run]) -> list[Row]:
    """The settings of all runs by name; those in which they differ first."""
    settings = [run.scales.settings for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    rows = [Row(name, tuple(one.get(name, "") for one in settings)) for name in names]
    return sorted(rows, key=lambda row: not row.differs)


def _figures(runs: Sequence[Run]) -> Iterator[tuple[FigureKind, list[Panel]]]:
    """The figures for which the runs have data."""
    for kind in FIGURES:
        panels = kind.panels(runs)
        if panels:
            yield kind, panels


def _drawn(kind: FigureKind, panels: Sequence[Panel]) -> Drawn:
    # matplotlib escapes the texts that it is given.
    pictures = [
        (panel, Markup(figures.render([panel], f"{kind.name}-{i}", "svg").decode()))
        for i, panel in enumerate(panels)
    ]
    return Drawn(
        kind.title,
        kind.caption,
        {run: list(row) for run, row in groupby(pictures, lambda pair: pair[0].run)},
    )


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
    counts = Counter(block.state for block in run.scales.blocks)
    others = ", ".join(f"{n} {state}" for state, n in counts.items() if state != "learned")
    return f"{counts['learned']} of {len(run.scales.blocks)}" + (f" ({others})" if others else "")


def _extreme(choose: Callable[..., BlockScale], run: Run) -> str:
    learned = _learned(run)
    if not learned:
        return ""
    block = choose(learned, key=lambda block: block.scale)
    return f"{block.scale:.3g} ({block.name})"


SUMMARY: dict[str, Callable[[Run], str]] = {
    "tensors with a learned scale": _count,
    "smallest learned scale": partial(_extreme, min),
    "largest learned scale": partial(_extreme, max),
    "iterations": _iterations,
    "loss before the trial step": _loss,
    "loss after the trial step": _trial_loss,
    "LayerNorms centered": lambda run: "yes" if run.scales.centered else "no",
}
