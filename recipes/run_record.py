"""What a run of a recipe is and came to: from its folder to a line of the results file.

    python recipes/run_record.py begin RUN --recipe ... --command 'fairseq-train ...'
    python recipes/run_record.py divergence LOG
    python recipes/run_record.py score RUN --results FILE

The recipes call it; `bash recipes/score.sh RUN...` scores again by hand.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fairseq_runs import (
    Corpus,
    RunError,
    Tokenisation,
    TrainingLog,
    read_translations,
    score,
    tokenised_bleu,
)
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results import (
    Circumstances,
    Comparison,
    RunRecord,
    Settings,
    TestScores,
    append_run,
    current_circumstances,
    curve,
    read_runs,
)
from fairseq_gradinit.storage import parse, write_atomically

ROOT = Path(__file__).resolve().parent.parent

# Options of fairseq-train that a record keeps elsewhere, or that do not decide what is trained.
ELSEWHERE = {
    *("--seed", "--save-dir", "--lr", "--warmup-updates", "--max-update", "--optimizer"),
    *("--max-tokens", "--update-freq", "--distributed-world-size"),
    *("--log-format", "--log-interval"),
}


@dataclass(frozen=True)
class About:
    """A run as its recipe began it, in RUN/run.json.

    Attributes:
        recipe, title, model: see `fairseq_gradinit.results.records`.
        corpus: the folder that data-prep/prepare.py made.
        command: of fairseq-train.
        decoding: what decides the translations, such as "beam 5".
        tokens_per_batch: max-tokens times update-freq times workers.
        subsets: parts of the corpus that are translated.
        split_compounds: whether tokenised BLEU is of words cut at their hyphens.
        baseline: the recipe to compare with.
    """

    recipe: str
    title: str
    model: str
    corpus: str
    seed: int
    command: str
    decoding: tuple[str, ...]
    workers: int
    tokens_per_batch: int
    subsets: tuple[str, ...]
    split_compounds: bool
    baseline: str
    circumstances: Circumstances

    @classmethod
    def read(cls, run: Path) -> About:
        """Of the run in this folder.

        Raises:
            RunError: there is none.
        """
        try:
            return parse(cls, json.loads((run / "run.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"{run} is no run of a recipe: run.json: {error}") from error

    @property
    def settings(self) -> Settings:
        """What decides the training, from its command, and the translations."""
        options = _options(shlex.split(self.command)[2:])
        values = dict(options)
        optimizer = values["--optimizer"]
        momentum = f"momentum {values.get('--momentum', '0')}"
        return Settings(
            model=self.model,
            optimizer=optimizer,
            optimizer_settings=values.get("--adam-betas", momentum),
            lr=float(values["--lr"]),
            warmup=int(values["--warmup-updates"]),
            updates=int(values["--max-update"]),
            tokens_per_batch=self.tokens_per_batch,
            options=(
                *(f"{name} {value}".strip() for name, value in options if name not in ELSEWHERE),
                *(f"--{word}" for word in self.decoding),
            ),
        )


def _options(words: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of an option and its value, which is empty for a flag."""
    pairs: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("--"):
            pairs.append((word, ""))
        else:
            name, value = pairs[-1]
            pairs[-1] = name, f"{value} {word}".strip()
    return pairs


def begin(run: Path, about: About) -> None:
    """Write down what is going to be run; the circumstances stay those of the start of training.

    Raises:
        GradInitError: the file cannot be written.
    """
    try:
        before = About.read(run)
        if before.command == about.command:
            about = replace(about, circumstances=before.circumstances)
        if about == before:
            return
    except RunError:
        pass
    write_atomically(run / "run.json", json.dumps(asdict(about), indent=1) + "\n")


def record(run: Path) -> RunRecord:
    """What came of a run.

    Raises:
        RunError: it is not there, or has not ended.
        OSError: a file of it cannot be read.
    """
    about = About.read(run)
    corpus = Corpus.read(Path(about.corpus))
    log = TrainingLog.read(run / "train.log")
    settings = about.settings
    diverged = (run / "diverged").read_text() if (run / "diverged").exists() else None
    if diverged is None:
        last = log.valid[-1][0] if log.valid else 0
        if last != settings.updates:
            raise RunError(
                f"{run} has not ended: the last validation in train.log is after {last} of "
                f"{settings.updates} updates; give the recipe again"
            )
    scores = () if diverged else tuple(_scores(run, about, corpus, part) for part in about.subsets)
    return RunRecord(
        recipe=about.recipe,
        title=about.title,
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        plateau=corpus.plateau,
        settings=settings,
        seed=about.seed,
        commands=(_without_folders(about),),
        circumstances=about.circumstances,
        status="diverged" if diverged else "finished",
        reason=diverged,
        seconds=log.seconds,
        gradinit_seconds=log.gradinit_seconds,
        seconds_per_update=log.seconds_per_update,
        tokens_per_second=log.tokens_per_second,
        valid=curve(log.valid),
        training=curve(log.training),
        valid_loss=None if diverged else log.valid[-1][1],
        scores=scores,
        comparison=None if diverged else _compare(run, about, settings, corpus),
    )


def _without_folders(about: About) -> str:
    """The command, whatever the run's folder was called by then."""
    options = dict(_options(shlex.split(about.command)[2:]))
    folder = Path(options["--save-dir"]).parent
    return about.command.replace(f"{folder}/", "").replace(about.corpus, Path(about.corpus).name)


def _scores(run: Path, about: About, corpus: Corpus, subset: str) -> TestScores:
    rows = read_translations(run / f"generate-{subset}.txt", corpus.folder, subset)
    found = score(corpus.folder, [row.reference for row in rows], [row.translation for row in rows])
    tokens = tokenised_bleu(
        corpus.folder, subset, [row.tokens for row in rows], about.split_compounds
    )
    signatures = (*found.signatures, *((tokens.signature,) if tokens else ()))
    return TestScores(subset, found.bleu, tokens.bleu if tokens else None, found.chrf, signatures)


def _compare(run: Path, about: About, settings: Settings, corpus: Corpus) -> Comparison | None:
    """Paired bootstrap resampling of BLEU on the last test set, against the baseline."""
    baseline = _baseline_run(run, about, settings)
    if baseline is None:
        return None
    subset = about.subsets[-1]
    own, other = (
        read_translations(folder / f"generate-{subset}.txt", corpus.folder, subset)
        for folder in (run, baseline)
    )
    metric = BLEU(
        lowercase=Tokenisation.read(corpus.folder).lowercase,
        references=[[r.reference for r in own]],
    )
    systems = [
        ("Baseline", [row.translation for row in other]),
        ("run", [row.translation for row in own]),
    ]
    signatures, results = PairedTest(systems, {"BLEU": metric}, None, test_type="bs")()
    first, second = results["BLEU"]
    return Comparison(
        about.baseline, second.score - first.score, second.p_value, str(signatures["BLEU"])
    )


def _baseline_run(run: Path, about: About, settings: Settings) -> Path | None:
    """The baseline's run with the same seed, size and length; of several the best one."""
    if about.recipe == about.baseline:
        return None
    # RUNS/CORPUS/ARM/SETTINGS/seed-N
    found: list[tuple[float, Path]] = []
    for path in sorted(run.resolve().parents[3].glob(f"{about.baseline}/*/seed-{about.seed}")):
        # One that is being trained or translated has no such stamp yet.
        if not (path / f"translate-{about.subsets[-1]}.done").exists():
            continue
        other = About.read(path)
        theirs = other.settings
        alike = ("model", "updates", "tokens_per_batch")
        if (other.corpus, other.decoding) == (about.corpus, about.decoding) and all(
            getattr(theirs, name) == getattr(settings, name) for name in alike
        ):
            found.append((TrainingLog.read(path / "train.log").valid[-1][1], path))
    return min(found)[1] if found else None


def keep(run: RunRecord, results: Path) -> bool:
    """Add the record to the file, unless it is there already; returns whether it was added.

    Raises:
        GradInitError: the file cannot be read or written.
    """
    if results.exists() and run in read_runs([results]):
        return False
    results.parent.mkdir(parents=True, exist_ok=True)
    append_run(results, run)
    return True


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run_command(options))
    except (GradInitError, RunError, OSError) as error:
        print(f"run_record: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    start = commands.add_parser("begin", help="write down what is going to be run")
    for name in ("recipe", "title", "model", "corpus", "command", "baseline"):
        start.add_argument(f"--{name}", required=True)
    for name in ("seed", "workers", "batch-tokens"):
        start.add_argument(f"--{name}", type=int, required=True)
    for name in ("decoding", "subsets"):
        start.add_argument(f"--{name}", nargs="+", required=True)
    start.add_argument("--split-compounds", action="store_true")
    start.set_defaults(run_command=_begin)
    diverged = commands.add_parser("divergence", help="why training diverged; 1 if it did not")
    diverged.add_argument("log", type=Path, help="of fairseq-train")
    diverged.set_defaults(run_command=_divergence)
    scores = commands.add_parser("score", help="score it and add a line to the results")
    scores.add_argument("--results", type=Path, required=True)
    scores.set_defaults(run_command=_score)
    for command in (start, scores):
        command.add_argument("run", type=Path, help="its folder")
    return parser


def _begin(options: argparse.Namespace) -> int:
    about = About(
        recipe=options.recipe,
        title=options.title,
        model=options.model,
        corpus=options.corpus,
        seed=options.seed,
        command=options.command,
        decoding=tuple(options.decoding),
        workers=options.workers,
        tokens_per_batch=options.batch_tokens,
        subsets=tuple(options.subsets),
        split_compounds=options.split_compounds,
        baseline=options.baseline,
        circumstances=current_circumstances(ROOT, workers=options.workers),
    )
    begin(options.run, about)
    return 0


def _divergence(options: argparse.Namespace) -> int:
    reason = TrainingLog.read(options.log).diverged
    if reason is None:
        return 1
    print(reason)
    return 0


def _score(options: argparse.Namespace) -> int:
    run = record(options.run)
    new = keep(run, options.results)
    print(f"{summary(run)} ({'added to' if new else 'as in'} {options.results})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
