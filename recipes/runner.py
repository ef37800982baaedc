"""Runs a case with fairseq's own programs: train, average, translate, score.

A step that ended well is skipped when the same case is run again, training resumes from its last
checkpoint, and a training that diverges is a result. The folder of a run holds

    run.json            the case, and when, where and with what it was begun
    checkpoints/        of fairseq-train
    STEP.log            what its program printed
    STEP.done           the commands of the step and of those before it
    diverged            why training ended early
    average.pt, generate-SUBSET.txt
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from cases import Case, RunError, begin
from checkpoints import trained_updates
from programs import Watch, execute, locked, shown
from training_log import TrainingLog

from fairseq_gradinit.results import RunRecord
from fairseq_gradinit.storage import write_atomically

log = logging.getLogger("runner")

HERE = Path(__file__).resolve().parent
STEPS = ("train", "average", "translate", "score")
PLUGIN = ("--user-dir", "fairseq_gradinit")
# With fairseq's default of 8, ve-fairseq 0.12.3 drops sentences that do not fill a multiple of it.
ALL_SENTENCES = ("--required-batch-size-multiple", "1")
# Without the thread that reads ahead: it can abort a training that has just ended.
NO_READING_THREAD = ("--data-buffer-size", "0")


@dataclass
class Run:
    """A case in a folder.

    Attributes:
        node: number of this machine; those after the first only train, and write no stamps.
        launch: what starts several processes, before the command of fairseq-train.
        threads: of each program, see `environment`.
        watch: is told what fairseq-train prints.
    """

    case: Case
    folder: Path
    node: int = 0
    launch: tuple[str, ...] = ()
    threads: int | None = None
    watch: Watch | None = None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def log_file(self, step: str) -> Path:
        """Of this machine: lines of several may not stay whole in one file."""
        return self.folder / (f"{step}.node-{self.node}.log" if self.node else f"{step}.log")

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Names and commands: learn the scales of another run, train, average, translate."""
        case, other = self.case, self.case.scales_of
        train = _training(case, self.checkpoints)
        if other is not None:
            learned = self.folder / "learned"
            first = ("--max-update", "1", "--disable-validation")
            yield "learn", [*_training(other, learned), *first]
            train += ["--gradinit-scales", str(learned / "gradinit_scales.json")]
        yield "train", train
        model = self.checkpoints / "checkpoint_last.pt"
        if case.average:
            model = self.folder / "average.pt"
            program = [sys.executable, str(HERE / "checkpoints.py"), "average"]
            last = ("--last", f"{case.average}", "--output", f"{model}")
            yield "average", [*program, str(self.checkpoints), *last]
        for subset in case.subsets:
            yield (
                f"translate-{subset}",
                [
                    *("fairseq-generate", f"{case.corpus}/data-bin", *PLUGIN),
                    *("--task", "translation", "--source-lang", case.source),
                    *("--target-lang", case.target, "--gen-subset", subset),
                    *("--path", str(model), "--results-path", str(self.folder), *case.decoding),
                    *("--remove-bpe", case.pieces, *ALL_SENTENCES),
                    *(["--fp16"] if "--fp16" in case.options else []),
                ],
            )

    def plan(self, steps: Sequence[str]) -> Iterator[tuple[str, list[str], str]]:
        """Of each program to run, the name, the command and the key: all that its output is of."""
        before = ""
        for name, command in self.commands():
            key = before + shlex.join(command)
            if not name.startswith("translate"):
                before = f"{key}\n"
            step = "train" if name == "learn" else name.partition("-")[0]
            if step in steps:
                yield name, [*(self.launch if name == "train" else ()), *command], key

    def show(self, steps: Sequence[str]) -> None:
        """Print the commands instead of running them."""
        print(shown(["mkdir", "-p", str(self.folder)]))
        for name, command, _ in self.plan(steps):
            print(f"{shown(command)} >> {shlex.quote(str(self.log_file(name)))} 2>&1")

    def carry_out(
        self, steps: Sequence[str] = STEPS, results: Path | None = None
    ) -> RunRecord | None:
        """Do what is not done yet; the record of a run that was scored is added to `results`.

        Raises:
            RunError: a step failed; running again resumes there.
            GradInitError, OSError: a file cannot be used.
        """
        # What cannot resume would only be mixed with what there is.
        if "--no-save" in self.case.options and not (self.folder / "train.done").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Machines train together.
        with nullcontext() if self.node else locked(self.folder / "lock", wait=False):
            self._require_same_training()
            if self.node == 0:
                begin(self.folder, self.case)
            for name, command, key in self.plan(steps):
                if name == "train":
                    self._train(command, key)
                elif self.node == 0 and not (self.folder / "diverged").exists():
                    self._step(name, command, key)
            if self.node > 0 or "score" not in steps:
                return None
            from records import add_record  # what scores takes seconds to import

            return add_record(self.folder, results)

    def _train(self, command: list[str], key: str) -> None:
        """Train; a run that diverges is a result, any other end an error."""
        # fairseq-train would add an update to a training that ended before its stamp was written.
        if trained_updates(self.checkpoints) >= self.case.settings.updates:
            self._write("train.done", key)
        try:
            self._step("train", command, key, self.watch)
        except RunError:
            reason = TrainingLog.read(self.log_file("train")).diverged
            if reason is None:
                raise
            log.info("diverged: %s", reason)
            self._write("diverged", reason)
            self._write("train.done", key)

    def _step(self, name: str, command: list[str], key: str, watch: Watch | None = None) -> None:
        """Run a program, unless it ended well before with the same key."""
        stamp = self.folder / f"{name}.done"
        if stamp.exists() and stamp.read_text() == key:
            log.info("%s: done before", name)
            return
        if self.node == 0:
            stamp.unlink(missing_ok=True)
        log_file = self.log_file(name)
        log.info("%s >> %s", shown(command), log_file)
        try:
            execute(command, log_file, watch, self.threads)
        except RunError as error:
            raise RunError(f"{name}: {error}") from error
        self._write(stamp.name, key)

    def _write(self, name: str, text: str) -> None:
        """On the first machine."""
        if self.node == 0:
            write_atomically(self.folder / name, text)

    def _require_same_training(self) -> None:
        """What was begun on another corpus or with other options must not be resumed."""
        manifest, mark = Path(self.case.corpus, "manifest.json"), self.folder / "training.json"
        if not manifest.exists():
            raise RunError(f"there is no corpus in {manifest.parent}")
        outputs = json.loads(manifest.read_text(encoding="utf-8"))["outputs"]
        training = json.dumps([outputs, self.case.options, self.case.seed])
        if not mark.exists():  # Another machine may be here before the first one.
            self._write(mark.name, training)
        elif mark.read_text() != training:
            raise RunError(
                f"{self.folder} was begun on another corpus or with other options: remove that "
                "folder, or choose another one"
            )


def _training(case: Case, save_dir: Path) -> list[str]:
    words = ["fairseq-train", f"{case.corpus}/data-bin", *case.options]
    return [*words, "--seed", f"{case.seed}", "--save-dir", f"{save_dir}"]


def prepare(case: Case, name: str, mirror: str | None, dry_run: bool = False) -> None:
    """Make the corpus of a case, which data-prep/prepare.py knows by this name."""
    corpus = Path(case.corpus)
    command = [sys.executable, str(HERE.parent / "data-prep" / "prepare.py"), name]
    command += ["--out", str(corpus), "--source-lang", case.source, "--target-lang", case.target]
    command += ["--mirror", mirror] if mirror else []
    print(shown(command), flush=True)
    if dry_run:
        return
    corpus.parent.mkdir(parents=True, exist_ok=True)
    # Others that need it wait for the first one.
    with locked(corpus.parent / f"{corpus.name}.lock", wait=True):
        if subprocess.run(command, check=False, close_fds=False).returncode != 0:
            raise RunError("the corpus could not be prepared, for the reason above")
