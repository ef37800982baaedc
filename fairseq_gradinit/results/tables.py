"""Markdown tables of training runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TypeVar

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results.circumstances import source
from fairseq_gradinit.results.records import Comparison, RunRecord
from fairseq_gradinit.storage import parse

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

SIGNIFICANT = 0.05


def by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Groups in the order in which they first appear."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def spread(values: Iterable[float | None], digits: int = 2) -> str:
    """Mean and sample standard deviation of those that are there; no deviation of a single one."""
    found = [value for value in values if value is not None]
    if not found:
        return ""
    deviation = f" ± {stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{fmean(found):.{digits}f}{deviation}"


def count(runs: Sequence[object]) -> str:
    """Such as "3 runs"."""
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}"


def seeds(statuses: Sequence[str]) -> str:
    """How many runs there are, and how many of them diverged."""
    diverged = statuses.count("diverged")
    return f"{len(statuses)}" + (f", {diverged} diverged" if diverged else "")


def ratio(seconds: float | None, seconds_per_update: float | None) -> float | None:
    """A time in updates; None where it is unknown."""
    if seconds is None or not seconds_per_update:
        return None
    return seconds / seconds_per_update


def markdown_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


# ---- Published figures.

LINK = re.compile(r"https?://[^\s<>]*[^\s<>.,;:)]")


@dataclass(frozen=True)
class Published:
    """A figure of a paper, shown beside the runs of a recipe; `metric` is such as "BLEU"."""

    corpus: str
    recipe: str
    metric: str
    value: float
    source: str


def read_published(path: Path) -> list[Published]:
    """Read a JSON array of published figures.

    Raises:
        GradInitError: it cannot be read, or an entry is not such a figure or has no link.
    """
    try:
        figures = [parse(Published, entry) for entry in json.loads(path.read_text("utf-8"))]
    except (OSError, TypeError, ValueError) as error:
        raise GradInitError(f"cannot read published figures from {path}: {error}") from error
    for figure in figures:
        if not LINK.search(figure.source):
            raise GradInitError(f"{path} has a source without a link: {figure.source}")
    return figures


# ---- The tables of runs.


def report(runs: Sequence[RunRecord], published: Sequence[Published], command: str) -> str:
    """A table for each corpus and model, with a row for each recipe and its settings."""
    groups = by(runs, lambda run: (run.corpus, run.settings.model, run.corpus_digest))
    names = [key[:2] for key in groups]
    parts = []
    for (corpus, model, digest), group in groups.items():
        version = f" ({digest[:7]})" if names.count((corpus, model)) > 1 else ""
        parts.append(f"### {corpus}{version}, {model}\n\n{_table(group, published, command)}\n")
    return "\n".join(parts)


def _table(runs: Sequence[RunRecord], published: Sequence[Published], command: str) -> str:
    recipes = {run.recipe: run.title for run in runs}
    figures = [f for f in published if f.corpus == runs[0].corpus and f.recipe in recipes]
    sources = list(dict.fromkeys(figure.source for figure in figures))
    rows = []
    for group in by(runs, lambda run: (run.recipe, run.settings)).values():
        own = (
            f"{f.metric} {f.value:g} ({sources.index(f.source) + 1})"
            for f in figures
            if f.recipe == group[0].recipe
        )
        columns = {**_settings(group[0], runs, recipes), **_measured(group, runs)}
        rows.append({**columns, "published": ", ".join(own)})
    # Scores, for one, are not there in every table.
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    links = [LINK.sub(r"<\g<0>>", text) for text in sources]
    lines = [
        markdown_rows(header, [[row[name] for name in header] for row in rows]),
        *(f"({i}) {text}" for i, text in enumerate(links, 1)),
        _reading(runs),
        source(command, count(runs), [run.circumstances for run in runs]) + ".",
    ]
    return "\n\n".join(lines)


def _settings(
    run: RunRecord, runs: Sequence[RunRecord], recipes: Mapping[str, str]
) -> dict[str, str]:
    """What was run. Options are shown only where recipes do not tell, lengths only if they vary."""
    settings, title = run.settings, recipes[run.recipe]
    ambiguous = list(recipes.values()).count(title) > 1
    options = [other.settings.options for other in runs if other.recipe == run.recipe]
    shared = set(options[0]).intersection(*options)
    special = " ".join(option for option in settings.options if option not in shared)
    lengths = {other.settings.updates for other in runs}
    sizes = {other.settings.tokens_per_batch for other in runs}
    return {
        "start": f"{title} ({run.recipe})" if ambiguous else title,
        "optimizer": f"{settings.optimizer} {settings.optimizer_settings}".strip(),
        "peak lr": f"{settings.lr:g}",
        "warmup updates": f"{settings.warmup}",
        "updates": f"{settings.updates}" if len(lengths) > 1 else "",
        "tokens a batch": f"{settings.tokens_per_batch}" if len(sizes) > 1 else "",
        "options": f"`{special}`" if special else "",
    }


def _measured(group: Sequence[RunRecord], runs: Sequence[RunRecord]) -> dict[str, str]:
    """What came of the runs in a row of the table of `runs`."""
    finished = [run for run in group if run.status == "finished"]
    columns = {
        "seeds": seeds([run.status for run in group]),
        "validation loss": spread(run.valid_loss for run in finished),
    }
    tests = dict.fromkeys(scores.name for run in runs for scores in run.scores)
    for test in tests:
        found = [scores for run in finished for scores in run.scores if scores.name == test]
        place = f", {test}" if len(tests) > 1 else ""
        columns |= {
            f"BLEU (sacrebleu){place}": spread((scores.bleu for scores in found), 1),
            f"tokenised BLEU{place}": spread((scores.tokenised_bleu for scores in found), 1),
            f"chrF2{place}": spread((scores.chrf for scores in found), 1),
        }
    costs = (ratio(run.gradinit_seconds, run.seconds_per_update) for run in group)
    return {
        **columns,
        "cost of GradInit, updates": spread(costs, 0),
        "tokens/s": spread((run.tokens_per_second for run in group), 0),
        "p-value": _significance([run.comparison for run in finished if run.comparison]),
    }


def _significance(compared: Sequence[Comparison]) -> str:
    """The p-value of a single run; of several, how many are significantly better and worse."""
    if not compared:
        return ""
    if len(compared) == 1:
        return f"{compared[0].p_value:.3f} ({compared[0].bleu_difference:+.1f} BLEU)"
    significant = [c.bleu_difference for c in compared if c.p_value < SIGNIFICANT]
    better = sum(difference > 0 for difference in significant)
    counts = {"better": better, "worse": len(significant) - better}
    parts = [f"{n} of {len(compared)} {word}" for word, n in counts.items() if n]
    return ", ".join(parts) or f"none of {len(compared)}"


def _reading(runs: Sequence[RunRecord]) -> str:
    """How the numbers are to be read."""
    lengths = {run.settings.updates for run in runs}
    sizes = {run.settings.tokens_per_batch for run in runs}
    both = len(lengths) == len(sizes) == 1
    length = f"{max(lengths):,} updates of {max(sizes):,} tokens at most. " if both else ""
    text = (
        f"{length}Mean ± standard deviation over the seeds that did not diverge; validation loss "
        f"in base 2, the unigram plateau is {runs[0].plateau:.2f}."
    )
    compared = [run.comparison for run in runs if run.comparison]
    if compared:
        text += (
            f" p-value: of the difference in BLEU from {compared[0].baseline}; of several seeds, "
            f"how many have p < {SIGNIFICANT:g}."
        )
    lines = [line for run in runs for scores in run.scores for line in scores.signatures]
    lines += [comparison.signature for comparison in compared]
    signatures = [f"`{line}`" for line in dict.fromkeys(lines)]
    return f"{text} Signatures: {', '.join(signatures)}." if signatures else text
