"""What came of training runs: a file with one line of JSON for each, which only grows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from fairseq_gradinit.results.circumstances import Circumstances
from fairseq_gradinit.storage import append_line, parse, read_lines

MARGIN = 1.5
"""Bits below the unigram plateau that a run has to reach, see `trains`."""

Curve = tuple[tuple[int, float | None], ...]
"""Pairs of update and loss in base 2, the update rising; None where it was not finite."""


def curve(pairs: Iterable[tuple[int, float]]) -> Curve:
    """Losses as records keep them: JSON has no number for what is not finite."""
    return tuple((update, loss if math.isfinite(loss) else None) for update, loss in pairs)


def trains(valid_loss: float | None, plateau: float) -> bool:
    """Whether a run that ended at this loss got MARGIN bits below the unigram plateau."""
    return valid_loss is not None and valid_loss <= plateau - MARGIN


@dataclass(frozen=True)
class Settings:
    """How a run was trained and its model used, but for corpus and seed.

    Attributes:
        model: a short name, such as "4+4 layers, d 128, ffn 512".
        optimizer_settings: such as "(0.9, 0.98)" or "momentum 0.9".
        lr: the peak, to which it rises in `warmup` updates.
        tokens_per_batch: max-tokens times update-freq times workers.
        options: everything else on the command line of fairseq-train that is no path, and what
            decides how the test sets are translated.
    """

    model: str
    optimizer: str
    optimizer_settings: str
    lr: float
    warmup: int
    updates: int
    tokens_per_batch: int
    options: tuple[str, ...]


@dataclass(frozen=True)
class TestScores:
    """Of a translated test set, such as "test" or "newstest2013".

    Attributes:
        bleu, chrf: of the detokenised translations, by sacrebleu with these `signatures`.
        tokenised_bleu: of the tokens, which older papers report.
    """

    name: str
    bleu: float
    tokenised_bleu: float | None
    chrf: float
    signatures: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """BLEU of a run minus that of the baseline, a recipe, with the same seed.

    Attributes:
        p_value: of a test on the sentences of the test set, by sacrebleu with this `signature`.
    """

    baseline: str
    bleu_difference: float
    p_value: float
    signature: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run was, and what came of it. Losses are base 2; times are seconds.

    Attributes:
        recipe: corpus and start, such as "multi30k/gradinit-adam".
        title: what tables call the recipe, such as "GradInit, Adam".
        corpus_digest: a hash of its files.
        plateau: validation loss of the corpus's best unigram model.
        commands: what was run, without paths of the machine.
        seconds, gradinit_seconds: wall time of training, and of GradInit in it.
        seconds_per_update, tokens_per_second: medians over training; tokens of the target.
        valid, training: the loss over the updates.
        valid_loss: after the last update; None if it diverged.
        comparison: with the baseline; None for the baseline itself.
    """

    version: Literal[1] = 1
    recipe: str
    title: str
    corpus: str
    corpus_digest: str
    plateau: float
    settings: Settings
    seed: int
    commands: tuple[str, ...]
    circumstances: Circumstances
    status: Literal["finished", "diverged"]
    reason: str | None
    seconds: float | None
    gradinit_seconds: float | None
    seconds_per_update: float | None
    tokens_per_second: float | None
    valid: Curve
    training: Curve
    valid_loss: float | None
    scores: tuple[TestScores, ...]
    comparison: Comparison | None


def append_run(path: Path, run: RunRecord) -> None:
    """Add a run to a file, to which other processes may append too; see `append_line`."""
    append_line(path, asdict(run))


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs of all files; of several that are alike the last, at the place of the first.

    Raises:
        GradInitError: a file cannot be read, or a line is not such a record.
    """
    files = (read_lines(path, partial(parse, RunRecord), "a record of a run") for path in paths)
    runs = chain.from_iterable(files)
    last = {(run.recipe, run.corpus_digest, run.settings, run.seed): run for run in runs}
    return list(last.values())
