"""What came of training runs: a file with one line of JSON for each, which only grows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fairseq_gradinit.results.circumstances import Circumstances
from fairseq_gradinit.storage import append_line, parse, read_lines

VERSION = 1

MARGIN = 1.5
"""Bits below the unigram plateau that a run has to reach, see `trains`."""

Status = Literal["finished", "diverged"]

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
    """How a run was trained and its model used, but for corpus and seed: with the same ones, alike.

    Attributes:
        model: a short name, such as "4+4 layers, d 128, ffn 512".
        optimizer: fairseq's name of it.
        optimizer_settings: such as "(0.9, 0.98)" or "momentum 0.9".
        lr: the peak learning rate.
        warmup: updates in which the learning rate rises to the peak.
        updates: length of training.
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
    """Of a translated test set.

    Attributes:
        name: of the test set, such as "test" or "newstest2013".
        bleu, chrf: of the detokenised translations, by sacrebleu.
        tokenised_bleu: BLEU of the tokens, which older papers report.
        signatures: sacrebleu's lines, which say how the scores were computed.
    """

    name: str
    bleu: float
    tokenised_bleu: float | None
    chrf: float
    signatures: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """BLEU of a run beside that of the baseline with the same seed.

    Attributes:
        baseline: its recipe.
        bleu_difference: of the run minus that of the baseline.
        p_value: of a test on the sentences of the test set.
        signature: sacrebleu's line, which says how it was computed.
    """

    baseline: str
    bleu_difference: float
    p_value: float
    signature: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run was, and what came of it. Losses are base 2; times are seconds.

    Attributes:
        version: of this format.
        recipe: corpus and start, such as "multi30k/gradinit-adam".
        title: what tables call the recipe, such as "GradInit, Adam".
        corpus: its name.
        corpus_digest: a hash of its files.
        plateau: validation loss of the corpus's best unigram model.
        commands: what was run, without paths of the machine.
        status: of training.
        reason: why it did not finish.
        seconds: wall time of training.
        gradinit_seconds: wall time of GradInit; None without it.
        seconds_per_update: the median over training.
        tokens_per_second: of the target, the median over training.
        valid, training: the loss over the updates.
        valid_loss: after the last update; None if it diverged.
        scores: of the test sets; empty if none was translated.
        comparison: with the baseline; None for the baseline itself.
    """

    version: int = VERSION
    recipe: str
    title: str
    corpus: str
    corpus_digest: str
    plateau: float
    settings: Settings
    seed: int
    commands: tuple[str, ...]
    circumstances: Circumstances
    status: Status
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

    @property
    def key(self) -> tuple[str, str, Settings, int]:
        """What tells runs apart: a later record with the same one replaces an earlier one."""
        return self.recipe, self.corpus_digest, self.settings, self.seed


def append_run(path: Path, run: RunRecord) -> None:
    """Add a run to a file; a last line that was torn is removed first.

    Several processes may append to one file.

    Raises:
        GradInitError: the file cannot be written.
        ValueError: a number in the record is not finite.
    """
    append_line(path, asdict(run))


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The runs of all files; of several with the same key the last, at the place of the first.

    Raises:
        GradInitError: a file cannot be read, or a line is not such a record.
    """
    runs = [run for path in paths for run in read_lines(path, _parse_run, "a record of a run")]
    return list({run.key: run for run in runs}.values())


def _parse_run(row: Any) -> RunRecord:
    if isinstance(row, Mapping) and row.get("version", VERSION) != VERSION:
        raise ValueError(
            f"it has version {row['version']!r} of the format; this fairseq-gradinit reads version "
            f"{VERSION}, another may read it"
        )
    return parse(RunRecord, row)
