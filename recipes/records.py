"""What came of a run: from its folder to a record, a line of a file of results."""

from __future__ import annotations

import logging
import math
import shlex
from pathlib import Path

from cases import Begun, Case, RunError
from corpora import Corpus, is_lowercase, read_translations, score
from runner import Run
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest
from training_log import TrainingLog

from fairseq_gradinit.results import Comparison, RunRecord, append_run, curve, read_runs

log = logging.getLogger("runner")


def record(run: Path) -> RunRecord:
    """What came of the run in a folder; RunError if it has not ended."""
    begun = Begun.read(run)
    case, corpus = begun.case, Corpus.read(Path(begun.case.corpus))
    printed = TrainingLog.read(run / "train.log")
    diverged = (run / "diverged").read_text() if (run / "diverged").exists() else None
    last, valid_loss = printed.valid[-1] if printed.valid else (0, math.nan)
    if diverged is None and last != case.settings.updates:
        raise RunError(
            f"{run} has not ended: the last validation in train.log is after {last} of "
            f"{case.settings.updates} updates; run it again"
        )
    if diverged is None and not math.isfinite(valid_loss):
        diverged = "the validation loss is not finite"
    scores = []
    for part in () if diverged else case.subsets:
        rows = read_translations(run / f"generate-{part}.txt", corpus.folder, part)
        scores.append(score(corpus.folder, part, rows, case.split_compounds))
    return RunRecord(
        recipe=case.recipe,
        title=case.title,
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        plateau=corpus.plateau,
        settings=case.settings,
        seed=case.seed,
        commands=_commands(run, case),
        circumstances=begun.circumstances,
        status="diverged" if diverged else "finished",
        reason=diverged,
        seconds=printed.seconds,
        gradinit_seconds=printed.gradinit_seconds,
        seconds_per_update=printed.seconds_per_update,
        tokens_per_second=printed.tokens_per_second,
        valid=curve(printed.valid),
        training=curve(printed.training),
        valid_loss=None if diverged else valid_loss,
        scores=tuple(scores),
        comparison=None if diverged else _compare(run, case, corpus),
    )


def _commands(run: Path, case: Case) -> tuple[str, ...]:
    """What trained, without the folders of this machine."""
    folders = [run, *(Path(each.corpus).parent for each in (case, case.scales_of) if each)]
    commands = []
    for name, words in Run(case, run).commands():
        if name in ("learn", "train"):
            text = shlex.join(words)
            for folder in folders:
                text = text.replace(f"{folder}/", "")
            commands.append(text)
    return tuple(commands)


def _compare(run: Path, case: Case, corpus: Corpus) -> Comparison | None:
    """Paired bootstrap resampling of BLEU on the last test set, against the baseline."""
    baseline = _baseline_run(run, case)
    if baseline is None:
        return None
    subset = case.subsets[-1]
    own, other = (
        read_translations(folder / f"generate-{subset}.txt", corpus.folder, subset)
        for folder in (run, baseline)
    )
    references = [[row.reference for row in own]]
    metric = BLEU(lowercase=is_lowercase(corpus.folder), references=references)
    systems = [
        (name, [row.translation for row in rows])
        for name, rows in (("Baseline", other), ("run", own))
    ]
    signatures, results = PairedTest(systems, {"BLEU": metric}, None, test_type="bs")()
    first, second = results["BLEU"]
    difference, signature = second.score - first.score, str(signatures["BLEU"])
    return Comparison(str(case.baseline), difference, second.p_value, signature)


def _baseline_run(run: Path, case: Case) -> Path | None:
    """The baseline's run with the same seed, size and length; of several the best one."""
    if case.baseline in (None, case.recipe) or not case.subsets:
        return None
    use, alike = ("corpus", "average", "decoding"), ("model", "updates", "tokens_per_batch")
    # RUNS/CORPUS/ARM/SETTINGS/seed-N
    found: list[tuple[float, Path]] = []
    for path in run.resolve().parents[3].glob(f"{case.baseline}/*/seed-{case.seed}"):
        # One that is being trained or translated has no such stamp yet.
        if not (path / f"translate-{case.subsets[-1]}.done").exists():
            continue
        other = Begun.read(path).case
        if all(getattr(other, name) == getattr(case, name) for name in use) and all(
            getattr(other.settings, name) == getattr(case.settings, name) for name in alike
        ):
            found.append((TrainingLog.read(path / "train.log").valid[-1][1], path))
    return min(found)[1] if found else None


def add_record(run: Path, results: Path | None) -> RunRecord:
    """The record of a run, which is added to the results unless it is there already."""
    found, added = record(run), ""
    if results is not None and not (results.exists() and found in read_runs([results])):
        results.parent.mkdir(parents=True, exist_ok=True)
        append_run(results, found)
        added = f" (added to {results})"
    log.info("%s%s", summary(found), added)
    return found


def summary(run: RunRecord) -> str:
    """What a user reads first."""
    if run.status == "diverged":
        return f"diverged: {run.reason}"
    words = [f"validation loss {run.valid_loss:.3f}"]
    for part in run.scores:
        tokens = "" if part.tokenised_bleu is None else f", tokenised {part.tokenised_bleu:.2f}"
        words.append(f"{part.name}: BLEU {part.bleu:.2f}{tokens}, chrF2 {part.chrf:.2f}")
    if run.comparison is not None:
        difference, p = run.comparison.bleu_difference, run.comparison.p_value
        words.append(f"{difference:+.2f} BLEU against {run.comparison.baseline}, p = {p:.3f}")
    return "; ".join(words)
