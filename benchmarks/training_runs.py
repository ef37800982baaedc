"""Training runs as data: what determines one, how it is run, and the file that keeps them.

A run is a `Case` on a `Corpus`; fairseq's own programs train and translate it as subprocesses, one
thread each. What comes out is a `Run`, one line of JSON in a file that only grows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from record import REPOSITORY, current_circumstances

from fairseq_gradinit.results import curve
from fairseq_gradinit.storage import append_line, read_lines

# The recipes are no package: they are programs beside each other, as the benchmarks are.
sys.path += [str(REPOSITORY / "recipes"), str(REPOSITORY / "data-prep")]

from fairseq_runs import (
    ALL_SENTENCES,
    CRITERION,
    MODEL,
    PLUGIN,
    TASK,
    Corpus,
    RunError,
    Scores,
    TrainingLog,
    program,
    read_translations,
    run_quietly,
    score,
    translation_command,
)

log = logging.getLogger("training")

VALIDATIONS = 10
LOG_LINES = 75
SCALES = "gradinit_scales.json"

# As in recipes/quickstart.py, but for what a Case says. No workers for the data: each run is to
# stay on one core.
COMMON = [
    *(*TASK, *MODEL, *CRITERION),
    *("--weight-decay", "0.0001", "--lr-scheduler", "polynomial_decay"),
    *(*ALL_SENTENCES, "--num-workers", "0", "--log-format", "json"),
    *("--validate-interval", "100000", "--save-interval", "100000"),
]

Status = Literal["finished", "diverged"]


@dataclass(frozen=True)
class Arm:
    """One way to start training.

    Attributes:
        title, colour: for tables and pictures.
        options: for fairseq-train.
    """

    name: str
    title: str = field(compare=False)
    colour: str = field(compare=False)
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """Options for fairseq-train that go together, and what they are called in tables."""

    name: str = field(compare=False)
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """All that determines one run, but for the data of its corpus.

    Two cases are the same when they train the same, whatever their titles and colours are.

    Attributes:
        lr: the peak of the schedule, which falls to 0 in a line at the last update.
        warmup: updates in which the rate rises to the peak.
        scored: whether the test set is translated and scored.
        scales_of: the run whose learned scales are applied, instead of learning; of it no more than
            that is run.
    """

    corpus: str
    arm: Arm
    model: Options
    optimizer: Options
    lr: float
    warmup: int
    updates: int
    max_tokens: int
    scored: bool = False
    seed: int = 1
    scales_of: Case | None = None

    @property
    def label(self) -> str:
        """What `--only` searches, and what progress is reported with."""
        schedule = f"lr {self.lr:g} warmup {self.warmup}"
        return f"{self.corpus} {self.arm.name} {schedule} {self.optimizer.name} seed {self.seed}"

    @property
    def corpora(self) -> set[str]:
        """The names of those that the run reads."""
        return {self.corpus, *(self.scales_of.corpora if self.scales_of else ())}

    @property
    def folder_name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return f"{self.label.replace(' ', '-')}-{digest[:8]}"


def parse_case(row: Mapping[str, Any]) -> Case:
    """Read back what `dataclasses.asdict` and JSON made of a Case."""

    def parts(name: str) -> dict[str, Any]:
        return {**row[name], "options": tuple(row[name]["options"])}

    options = {name: Options(**parts(name)) for name in ("model", "optimizer")}
    other = row.get("scales_of")
    scales_of = None if other is None else parse_case(other)
    return Case(**{**row, "arm": Arm(**parts("arm")), **options, "scales_of": scales_of})


@dataclass(frozen=True)
class Run:
    """What came of a case. Losses are base 2 and label-smoothed; None where not finite.

    Attributes:
        corpus_digest: a hash of the files of the corpus.
        plateau: of the corpus, see `unigram_plateau`.
        circumstances: date, code, versions and machine when it started, see `record`.
        commands: of fairseq; the corpus's name and that of the run stand for their folders.
        reason: why it did not finish.
        seconds: wall time of everything.
        gradinit_seconds: of GradInit, as the run reported them.
        seconds_per_update: the median over the intervals between two lines of the log.
        valid, training: pairs of update and loss; a training loss is the mean since the one before.
        valid_loss: after the last update.
        bleu, chrf, signatures: of the test set.
    """

    case: Case
    corpus_digest: str
    plateau: float
    circumstances: dict[str, Any]
    commands: list[str]
    status: Status
    reason: str | None
    seconds: float
    gradinit_seconds: float | None = None
    seconds_per_update: float | None = None
    valid: Sequence[tuple[int, float | None]] = ()
    training: Sequence[tuple[int, float | None]] = ()
    valid_loss: float | None = None
    bleu: float | None = None
    chrf: float | None = None
    signatures: Sequence[str] | None = None

    @property
    def summary(self) -> str:
        """A few words for the progress line."""
        if self.status != "finished":
            return self.status
        bleu = "" if self.bleu is None else f", BLEU {self.bleu:.1f}"
        return f"validation loss {self.valid_loss:.3f}{bleu}"


@dataclass(frozen=True)
class RunsFile:
    """Runs in a file, one line of JSON each; it need not exist before the first."""

    path: Path

    def read(self) -> list[Run]:
        """All runs.

        Raises:
            GradInitError: a line is not of this program.
        """
        if not self.path.exists():
            return []
        return read_lines(self.path, _parse_run, "a run as this program writes them")

    def append(self, run: Run) -> None:
        append_line(self.path, asdict(run))


def _parse_run(row: Mapping[str, Any]) -> Run:
    return Run(**{**row, "case": parse_case(row["case"])})


def training_command(case: Case, data: Path, save_dir: Path) -> list[str]:
    saving = ["--no-epoch-checkpoints"] if case.scored else ["--no-save"]
    return [
        *(*program("train"), str(data), *PLUGIN, *COMMON),
        *("--lr", f"{case.lr:g}", "--warmup-updates", str(case.warmup)),
        *("--total-num-update", str(case.updates), "--max-update", str(case.updates)),
        *("--validate-interval-updates", str(max(1, case.updates // VALIDATIONS))),
        *("--log-interval", str(max(1, case.updates // LOG_LINES))),
        *("--max-tokens", str(case.max_tokens), "--seed", str(case.seed)),
        *(*case.model.options, *case.optimizer.options, *case.arm.options),
        *(*saving, "--save-dir", str(save_dir)),
    ]


def learning_command(case: Case, data: Path, save_dir: Path) -> list[str]:
    """Learns the scales of a case, and ends after the first update."""
    return [*training_command(case, data, save_dir), "--max-update", "1", "--disable-validation"]


def one_thread(
    command: Sequence[str], env: Mapping[str, str], **streams: Any
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env={**env, "OMP_NUM_THREADS": "1"}, **streams)


@dataclass(frozen=True)
class Runner:
    """Runs a case with fairseq's programs.

    Attributes:
        work: for logs, and for checkpoints as long as they are needed.
    """

    corpora: Mapping[str, Corpus]
    work: Path

    def __call__(self, case: Case) -> Run:
        """Train, and translate if the case is scored.

        Raises:
            RunError: one of the programs failed, and training did not just diverge.
        """
        corpus = self.corpora[case.corpus]
        folder = self.work / case.folder_name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        checkpoints = folder / "checkpoints"
        learn, train, translate = commands = self._commands(case, folder, checkpoints)
        names = {str(each.folder): name for name, each in self.corpora.items()}
        names[str(folder)] = folder.name
        run = Run(
            case,
            corpus.digest,
            corpus.plateau,
            _circumstances(),
            [_readable(shlex.join([Path(c[0]).name, *c[1:]]), names) for c in commands if c],
            status="finished",
            reason=None,
            seconds=0.0,
        )
        start = time.monotonic()
        try:
            if learn:
                run_quietly(learn, folder / "learn.log", one_thread)
            run = self._train(run, train, folder / "train.log")
            if translate and run.status == "finished":
                scores = self._translate(translate, folder, corpus.folder)
                run = replace(run, **asdict(scores))
        except RunError as error:
            raise RunError(f"{case.label}: {error}") from error
        finally:
            shutil.rmtree(checkpoints, ignore_errors=True)
        return replace(run, seconds=time.monotonic() - start)

    def _commands(
        self, case: Case, folder: Path, checkpoints: Path
    ) -> tuple[list[str], list[str], list[str]]:
        """What learns the scales of another run, trains, and translates; empty where not asked."""
        corpus = self.corpora[case.corpus].folder
        train = training_command(case, corpus / "data-bin", checkpoints)
        learn, translate = [], []
        if case.scales_of is not None:
            data = self.corpora[case.scales_of.corpus].folder / "data-bin"
            learn = learning_command(case.scales_of, data, folder / "learned")
            train += ["--gradinit-scales", str(folder / "learned" / SCALES)]
        if case.scored:
            translate = translation_command(corpus, checkpoints / "checkpoint_last.pt", folder)
        return learn, train, translate

    def _train(self, run: Run, command: Sequence[str], log_file: Path) -> Run:
        """Train; a run that diverges is one too.

        Raises:
            RunError: the program failed for another reason.
        """
        reason = None
        try:
            run_quietly(command, log_file, one_thread)
        except RunError:
            reason = TrainingLog.read(log_file).diverged
            if reason is None:
                raise
        return with_log(run, log_file, reason)

    def _translate(self, command: Sequence[str], folder: Path, corpus: Path) -> Scores:
        run_quietly(command, folder / "translate.log", one_thread)
        rows = read_translations(folder / "generate-test.txt", corpus)
        return score(corpus, [row.reference for row in rows], [row.translation for row in rows])


def _circumstances() -> dict[str, Any]:
    """Those of a run: it has one thread, and does not depend on how this program was called."""
    found = {
        **current_circumstances(),
        "threads": 1,
        "fairseq": f"ve-fairseq {version('ve-fairseq')}",
    }
    del found["command"]
    return found


def _readable(text: str, names: Mapping[str, str]) -> str:
    """A text without the folders of this machine."""
    for folder, name in names.items():
        text = text.replace(folder, name)
    return text


def with_log(run: Run, log_file: Path, reason: str | None) -> Run:
    """The run with what its log says.

    Args:
        reason: why the command diverged, or None if it ended well.

    Raises:
        RunError: it ended well, but before its last update.
    """
    log = TrainingLog.read(log_file)
    last, valid_loss = log.valid[-1] if log.valid else (0, math.nan)
    if reason is None:
        if last != run.case.updates:
            raise RunError(f"no validation loss after the last update in {log_file}")
        if not math.isfinite(valid_loss):
            reason = "the validation loss is not finite"
    return replace(
        run,
        status="finished" if reason is None else "diverged",
        reason=reason,
        gradinit_seconds=log.gradinit_seconds,
        seconds_per_update=log.seconds_per_update,
        valid=curve(log.valid),
        training=curve(log.training),
        valid_loss=valid_loss if reason is None else None,
    )


def run_all(
    cases: Sequence[Case], run_one: Callable[[Case], Run], file: RunsFile, workers: int
) -> None:
    """Run the cases side by side, and keep each as soon as it has ended.

    Args:
        run_one: called in a thread of its own for each worker.

    Raises:
        RunError: a run failed; those beside it have ended and are kept, no others were started.
    """
    lock, stopped = threading.Lock(), threading.Event()
    start, done = time.monotonic(), 0

    def work(case: Case) -> None:
        nonlocal done
        if stopped.is_set():
            return
        try:
            run = run_one(case)
        except BaseException:
            stopped.set()
            raise
        with lock:
            file.append(run)
            done += 1
            log.info(progress(run, done, len(cases), time.monotonic() - start))

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, case) for case in cases]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # Ctrl-C, which has reached fairseq's programs too
            stopped.set()
            raise


def progress(run: Run, done: int, count: int, elapsed: float) -> str:
    """A line about a run that has ended, and how long the others will take if they are like it."""
    left = timedelta(seconds=round(elapsed / done * (count - done)))
    so_far = timedelta(seconds=round(elapsed))
    estimate = f", about {left} to go" if done < count else ""
    return f"{run.case.label}: {run.summary}; {done} of {count} after {so_far}{estimate}"
