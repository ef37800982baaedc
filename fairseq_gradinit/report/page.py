"""The report of one or several runs: an HTML page that needs nothing beside it.

Needs jinja2 and matplotlib (`pip install 'fairseq-gradinit[plot]'`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fairseq_gradinit import __version__
from fairseq_gradinit.report import figures
from fairseq_gradinit.report.figures import Run
from fairseq_gradinit.scales import EFFECT_FILE, Effect, Scales, scales_file

FIGURES = {
    "Scales": (
        figures.scales,
        "The factor on every tensor, by kind and layer: red is larger than 1, blue smaller. In "
        "italics: given, not learned. Kinds of tensors that kept their values are left out.",
    ),
    "Residual branches": (
        figures.branches,
        "What f(x) makes up of the variance of x + f(x), before (dashed) and after: how much a "
        "sublayer depends on its own branch (Liu et al., EMNLP 2020, section 4).",
    ),
    "Iterations": (
        figures.iterations,
        "The loss on a batch before the trial step, and on another batch, which shares half of "
        "its sentences, after it. Where the norm of the gradient is bounded by gamma, an iteration "
        "above the bound descends the norm instead of the loss.",
    ),
}
"""By title: what draws the panels, and a caption."""


def read_run(path: Path) -> Run:
    """The run of a scales file, or of a folder."""
    file = scales_file(path)
    beside = file.with_name(EFFECT_FILE)
    shares = Effect.load(beside).shares if beside.exists() else ()
    return Run(str(path), Scales.load(file), shares)


def page(runs: Sequence[Run], command: str) -> str:
    """The HTML page. It loads nothing from elsewhere, and is the same for the same runs."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    template: jinja2.Template = jinja2.Template(text, autoescape=True, trim_blocks=True)
    settings = _rows([run.scales.settings for run in runs])
    return template.render(
        title=f"GradInit: {', '.join(run.label for run in runs)}",
        command=command,
        version=__version__,
        runs=runs,
        summary=_rows([_summary(run) for run in runs]),
        figures=_drawn(runs),
        # Those in which the runs differ come first.
        settings=sorted(settings, key=lambda row: len(set(row[1])) == 1),
    )


def _rows(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, tuple[str, ...]]]:
    """Names and values of a table with a column for each run."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, tuple(column.get(name, "") for column in columns)) for name in names]


def _drawn(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The figures for which the runs have data; in `rows`, each run's panels and pictures."""
    found = []
    for title, (panels_of, caption) in FIGURES.items():
        # matplotlib escapes the texts that it is given.
        pictures = [
            (panel, Markup(figures.render(panel, f"{title}-{i}")))
            for i, panel in enumerate(panels_of(runs))
        ]
        rows = {run: list(row) for run, row in groupby(pictures, lambda pair: pair[0].run)}
        if rows:
            found.append({"title": title, "caption": caption, "rows": rows})
    return found


def _summary(run: Run) -> dict[str, str]:
    blocks, history = run.scales.blocks, run.scales.history
    counts = Counter(block.state for block in blocks)
    others = ", ".join(f"{n} {state}" for state, n in counts.items() if state != "learned")
    learned = [block for block in blocks if block.state == "learned"]
    ends = [choose(learned, key=lambda block: block.scale) for choose in (min, max) if learned]
    smallest, largest = [f"{block.scale:.3g} ({block.name})" for block in ends] or ("", "")
    constraint = sum(iteration.kind == "constraint" for iteration in history)
    iterations = f"{len(history)}" if history else "not recorded"
    return {
        "tensors with a learned scale": f"{len(learned)} of {len(blocks)}"
        + (f" ({others})" if others else ""),
        "smallest learned scale": smallest,
        "largest learned scale": largest,
        "iterations": iterations
        + (f", {constraint} of them for the constraint" if constraint else ""),
        "loss before the trial step": _ends([i.loss for i in history]),
        "loss after the trial step": _ends([i.trial_loss for i in history]),
        "LayerNorms centered": "yes" if run.scales.centered else "no",
    }


def _ends(losses: Sequence[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    return f"{known[0]:.3f} to {known[-1]:.3f}" if known else ""
