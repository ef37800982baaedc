"""Markdown tables of training runs, as a README shows them, and what they are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TypeVar

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results.circumstances import source
from fairseq_gradinit.results.records import Comparison, RunRecord, Settings, TestScores
from fairseq_gradinit.storage import parse

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

SIGNIFICANT = 0.05


# ---- For any table.


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
    """How many runs there are."""
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
    """The lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


# ---- Published figures.


@dataclass(frozen=True)
class Published:
    """A figure of a paper, shown beside the runs of a recipe.

    Attributes:
        corpus, recipe: of the runs.
        metric: what it is, such as "tokenised BLEU".
        source: where it was published, such as "https://arxiv.org/abs/2102.08098, Table 4".
    """

    corpus: str
    recipe: str
    metric: str
    value: float
    source: str


LINK = re.compile(r"https?://[^\s<>]*[^\s<>.,;:)]")


def read_published(path: Path) -> list[Published]:
    """Read a JSON array of published figures.

    Raises:
        GradInitError: it cannot be read, or an entry is not such a figure or has no link.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GradInitError(f"cannot read published figures from {path}: {error}") from error
    if not isinstance(entries, list):
        raise GradInitError(f"{path} is no JSON array of published figures: put [ and ] around it")
    return [_published(entry, f"entry {i} of {path}") for i, entry in enumerate(entries, 1)]


def _published(entry: object, name: str) -> Published:
    try:
        figure = parse(Published, entry)
    except ValueError as error:
        raise GradInitError(f"{name} is not a published figure ({error}): fix it") from error
    if not LINK.search(figure.source):
        raise GradInitError(
            f"{name} has no link in its source: name the place where it was published"
        )
    return figure


# ---- The tables of runs.


def report(runs: Sequence[RunRecord], published: Sequence[Published], command: str) -> str:
    """A table for each corpus and model, with a row for each recipe and its settings.

    Args:
        command: what prints these tables, for the line that says where they come from.
    """
    groups = by(runs, lambda run: (run.corpus, run.settings.model, run.corpus_digest))
    names = [key[:2] for key in groups]
    parts = []
    for (corpus, model, digest), group in groups.items():
        version = f" ({digest[:7]})" if names.count((corpus, model)) > 1 else ""
        parts.append(f"### {corpus}{version}, {model}\n\n{_table(group, published, command)}\n")
    return "\n".join(parts)


def _table(runs: Sequence[RunRecord], published: Sequence[Published], command: str) -> str:
    settings = list(by(runs, lambda run: (run.recipe, run.settings)).values())
    recipes = {run.recipe: run.title for run in runs}
    figures = [f for f in published if f.corpus == runs[0].corpus and f.recipe in recipes]
    sources = list(dict.fromkeys(figure.source for figure in figures))
    rows = []
    for group in settings:
        own = [figure for figure in figures if figure.recipe == group[0].recipe]
        rows.append(
            {
                **_start(group, recipes),
                **_distinctions(group[0], runs),
                **_measured(group, runs),
                "published": ", ".join(
                    f"{f.metric} {f.value:g} ({sources.index(f.source) + 1})" for f in own
                ),
            }
        )
    # Scores, for one, are not there in every table.
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [
        markdown_rows(header, [[row[name] for name in header] for row in rows]),
        *(f"({i}) {linked}" for i, linked in enumerate(map(_linked, sources), 1)),
        _reading(runs),
        source(command, count(runs), [run.circumstances for run in runs]) + ".",
    ]
    return "\n\n".join(lines)


def _linked(text: str) -> str:
    return LINK.sub(r"<\g<0>>", text)


def _start(group: Sequence[RunRecord], recipes: dict[str, str]) -> dict[str, str]:
    """What was run."""
    recipe, settings = group[0].recipe, group[0].settings
    title = recipes[recipe]
    ambiguous = list(recipes.values()).count(title) > 1
    return {
        "start": f"{title} ({recipe})" if ambiguous else title,
        "optimizer": f"{settings.optimizer} {settings.optimizer_settings}".strip(),
        "peak lr": f"{settings.lr:g}",
        "warmup updates": f"{settings.warmup}",
    }


def _distinctions(run: RunRecord, runs: Sequence[RunRecord]) -> dict[str, str]:
    """Settings that are not those of the whole table; options only where recipes do not tell."""
    everyone = {other.settings for other in runs}
    options = [_options(other.settings) for other in runs if other.recipe == run.recipe]
    shared = set(options[0]).intersection(*options)
    special = " ".join(o for o in _options(run.settings) if o not in shared)
    several_lengths = len({settings.updates for settings in everyone}) > 1
    several_sizes = len({settings.tokens_per_batch for settings in everyone}) > 1
    return {
        "updates": f"{run.settings.updates}" if several_lengths else "",
        "tokens a batch": f"{run.settings.tokens_per_batch}" if several_sizes else "",
        "options": f"`{special}`" if special else "",
    }


def _options(settings: Settings) -> list[str]:
    """Each option together with its values."""
    return re.split(r" (?=--)", " ".join(settings.options))


def _measured(group: Sequence[RunRecord], runs: Sequence[RunRecord]) -> dict[str, str]:
    """What came of it."""
    finished = [run for run in group if run.status == "finished"]
    tests = dict.fromkeys(scores.name for run in runs for scores in run.scores)
    columns = {
        "seeds": seeds([run.status for run in group]),
        "validation loss": spread(run.valid_loss for run in finished),
    }
    for test in tests:
        found = [scores for run in finished for scores in run.scores if scores.name == test]
        place = f", {test}" if len(tests) > 1 else ""
        columns |= {f"{name}{place}": value for name, value in _scores(found).items()}
    baselines = {run.comparison.baseline for run in runs if run.comparison}
    compared = [run.comparison for run in finished if run.comparison]
    return {
        **columns,
        "cost of GradInit, updates": spread(
            (ratio(run.gradinit_seconds, run.seconds_per_update) for run in group), 0
        ),
        "tokens/s": spread((run.tokens_per_second for run in group), 0),
        "p-value": _significance(compared, several_baselines=len(baselines) > 1),
    }


def _scores(found: Sequence[TestScores]) -> dict[str, str]:
    return {
        "BLEU (sacrebleu)": spread((scores.bleu for scores in found), 1),
        "tokenised BLEU": spread((scores.tokenised_bleu for scores in found), 1),
        "chrF2": spread((scores.chrf for scores in found), 1),
    }


def _significance(compared: Sequence[Comparison], several_baselines: bool) -> str:
    parts = []
    for baseline, group in by(compared, lambda comparison: comparison.baseline).items():
        against = f" against {baseline}" if several_baselines else ""
        parts.append(_verdict(group) + against)
    return "; ".join(parts)


def _verdict(compared: Sequence[Comparison]) -> str:
    """The p-value of a single run; of several, how many are significantly better and worse."""
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
    baselines = sorted({run.comparison.baseline for run in runs if run.comparison})
    if baselines:
        text += (
            f" p-value: of the difference in BLEU from {', '.join(baselines)}; of several seeds, "
            f"how many have p < {SIGNIFICANT:g}."
        )
    compared = [run.comparison.signature for run in runs if run.comparison]
    scored = [line for run in runs for scores in run.scores for line in scores.signatures]
    signatures = [f"`{line}`" for line in dict.fromkeys([*scored, *compared])]
    return f"{text} Signatures: {', '.join(signatures)}." if signatures else text
