"""From raw text to BLEU with GradInit: the program behind `make quickstart`.

Prepares a German-English corpus, trains a small post-LN Transformer without warmup on what
GradInit made of its initialisation, translates the test set, and scores it. With --compare it
trains the same model from the default initialisation too, without warmup and with it, and shows
the three side by side, each for fewer updates. Run again, it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataprep import DataPrepError
from dataprep.steps import fingerprint, write_json
from fairseq_runs import (
    ALL_SENTENCES,
    CRITERION,
    MODEL,
    PLUGIN,
    SOURCE,
    TARGET,
    TASK,
    Row,
    RunError,
    Scores,
    TrainingLog,
    environment,
    failure,
    program,
    read_translations,
    run_quietly,
    score,
    translation_command,
)
from resume import CannotResume, trained_updates
from tqdm import tqdm

from fairseq_gradinit.report.plot import save_picture
from fairseq_gradinit.scales import SCALES_FILE, Scales

log = logging.getLogger("quickstart")

ROOT = Path(__file__).resolve().parent.parent
UPDATES = 1500
COMPARED_UPDATES = 700
"""So that three arms take a quarter of an hour on two cores."""
SEED = 1
EXAMPLES = 10

TRAINING = [
    *(*TASK, *CRITERION),
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--weight-decay", "0.0001"),
    *("--lr", "0.001", "--lr-scheduler", "polynomial_decay"),
    *("--max-tokens", "1000", *ALL_SENTENCES),
]
# Keeps a state to resume from every 200 updates, and only the last of them.
HOUSEKEEPING = [
    *("--save-interval-updates", "200", "--keep-interval-updates", "1", "--no-epoch-checkpoints"),
    *("--validate-interval", "1000", "--num-workers", "1"),
    # Without the thread that reads ahead: it can abort a training that has just ended.
    *("--data-buffer-size", "0"),
    *("--log-format", "json", "--log-interval", "20"),
]


@dataclass(frozen=True)
class Arm:
    """One way to start training.

    Attributes:
        name: of its folder.
        title: for tables and pictures.
        options: what it adds to the command that all arms share.
    """

    name: str
    title: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """What the user decides.

    Attributes:
        run_dir: folder for everything that the program makes.
        updates: length of training.
        seed: of initialisation, data order and dropout.
    """

    run_dir: Path
    updates: int
    seed: int

    @property
    def corpus(self) -> Path:
        return self.run_dir / "corpus"

    @property
    def arms(self) -> tuple[Arm, Arm, Arm]:
        warmup = self.updates // 4
        return (
            Arm("gradinit", "GradInit, no warmup", ("--gradinit", "--warmup-updates", "0")),
            Arm("no-warmup", "default, no warmup", ("--warmup-updates", "0")),
            Arm("warmup", f"default, warmup {warmup}", ("--warmup-updates", str(warmup))),
        )

    @property
    def outcome(self) -> Path:
        """Apart for each length and seed, so that trying another one loses nothing."""
        return self.run_dir / f"{self.updates}-updates-seed-{self.seed}"

    def folder(self, arm: Arm) -> Path:
        return self.outcome / arm.name

    def checkpoints(self, arm: Arm) -> Path:
        return self.folder(arm) / "checkpoints"

    def training_command(self, arm: Arm) -> list[str]:
        length = str(self.updates)
        return [
            *program("train"),
            *(str(self.corpus / "data-bin"), *PLUGIN, *arm.options, *MODEL, *TRAINING),
            *("--total-num-update", length, "--max-update", length, "--seed", str(self.seed)),
            *(*HOUSEKEEPING, "--save-dir", str(self.checkpoints(arm))),
        ]

    def translation_command(self, arm: Arm) -> list[str]:
        checkpoint = self.checkpoints(arm) / "checkpoint_last.pt"
        return translation_command(self.corpus, checkpoint, self.folder(arm))


@dataclass(frozen=True)
class Result:
    """What one arm came to.

    Attributes:
        valid_loss: base-2 validation loss after the last update.
        scores: of the test set.
        train_seconds, translate_seconds: wall time.
        curve: (update, base-2 training loss).
        rows: of the test set.
    """

    arm: Arm
    valid_loss: float
    scores: Scores
    train_seconds: float
    translate_seconds: float
    curve: list[tuple[int, float]]
    rows: list[Row]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--compare", action="store_true", help="train the default init too")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "quickstart-run")
    lengths = f"{UPDATES}; of each arm with --compare: {COMPARED_UPDATES}"
    parser.add_argument("--updates", type=int, help=f"length of training (default: {lengths})")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--mirror", help="folder that holds the corpus's wheels")
    options = parser.parse_args(arguments)
    updates = options.updates or (COMPARED_UPDATES if options.compare else UPDATES)
    settings = Settings(options.run_dir, updates, options.seed)
    start = time.monotonic()
    try:
        prepare_corpus(settings, options.mirror)
        corpus_seconds = time.monotonic() - start
        arms = settings.arms if options.compare else settings.arms[:1]
        results = [run_arm(arm, settings) for arm in arms]
    except (RunError, DataPrepError, CannotResume) as error:
        log.error("quickstart: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("quickstart: interrupted; the same command goes on from here")
        return 130
    picture = settings.outcome / ("compare.png" if options.compare else "quickstart.png")
    scales = Scales.load(settings.checkpoints(settings.arms[0]) / SCALES_FILE)
    save_picture(picture, {result.arm.title: result.curve for result in results}, scales)
    show_examples(results[0])
    show_results(results, settings)
    log.info(
        "corpus: %.0f s; everything, this time: %.0f s", corpus_seconds, time.monotonic() - start
    )
    show_files(settings, picture, "make test" if options.compare else "make quickstart-compare")
    return 0


def once(
    marker: Path, ingredients: dict[str, Any], work: Callable[[], dict | None]
) -> dict[str, Any]:
    """What `work` reports, from `marker` if it was done before with the same ingredients."""
    key = fingerprint(ingredients)
    try:
        done = json.loads(marker.read_text())
        if done["key"] == key:
            log.info("%s: finished before, skipped", marker.stem)
            return done
    except (OSError, ValueError, KeyError, TypeError):
        pass
    start = time.monotonic()
    found = work() or {}
    report = {"key": key, "seconds": time.monotonic() - start, **found}
    write_json(marker, report)
    return report


def prepare_corpus(settings: Settings, mirror: str | None) -> None:
    """Make the corpus, as far as it is not there yet."""
    command = [sys.executable, str(ROOT / "data-prep" / "prepare.py"), "quickstart"]
    command += ["--out", str(settings.corpus), "--source-lang", SOURCE, "--target-lang", TARGET]
    command += ["--mirror", mirror] if mirror else []
    log.info("\n== corpus: raw text to binarised data\n%s", shlex.join(command))
    if subprocess.run(command, check=False).returncode != 0:
        raise RunError("the preparation of the corpus failed, for the reason above")


def run_arm(arm: Arm, settings: Settings) -> Result:
    """Train, translate and score one arm."""
    folder = settings.folder(arm)
    folder.mkdir(parents=True, exist_ok=True)
    trained = train(arm, settings)
    command = settings.translation_command(arm)
    log.info("\n== %s: translate the test set\n%s", arm.title, shlex.join(command))
    translated = once(
        folder / "translate.json",
        {"command": command, "trained": trained["key"]},
        lambda: run_quietly(command, folder / "translate.log"),
    )
    rows = read_translations(folder / "generate-test.txt", settings.corpus)
    scores = score(
        settings.corpus, [row.reference for row in rows], [row.translation for row in rows]
    )
    return Result(
        arm=arm,
        valid_loss=trained["valid_loss"],
        scores=scores,
        train_seconds=trained["seconds"],
        translate_seconds=translated["seconds"],
        curve=[(update, loss) for update, loss in trained["curve"]],
        rows=rows,
    )


def train(arm: Arm, settings: Settings) -> dict[str, Any]:
    """Run fairseq-train, resuming what was interrupted; returns curve, valid_loss and seconds."""
    folder = settings.folder(arm)
    command = settings.training_command(arm)
    data = json.loads((settings.corpus / "manifest.json").read_text())["outputs"]
    ingredients = {"command": command, "data": data}
    started = folder / "started.json"
    key = {"key": fingerprint(ingredients)}
    if not started.exists() or json.loads(started.read_text()) != key:
        shutil.rmtree(settings.checkpoints(arm), ignore_errors=True)
        (folder / "train.log").unlink(missing_ok=True)
        write_json(started, key)
    log.info("\n== %s: train\n%s", arm.title, shlex.join(command))

    def work() -> dict[str, Any]:
        # fairseq-train would add an update to a training that has ended.
        if trained_updates(settings.checkpoints(arm)) < settings.updates:
            with tqdm(total=settings.updates, desc=arm.title, unit="update", mininterval=5) as bar:
                follow_training(command, folder / "train.log", bar)
        losses = TrainingLog.read(folder / "train.log")
        if not losses.valid:
            raise RunError(f"no validation loss in {folder / 'train.log'}")
        # What earlier processes took, too, if this one went on from a checkpoint.
        return {
            "curve": losses.training,
            "valid_loss": losses.valid[-1][1],
            "seconds": losses.seconds,
        }

    return once(folder / "train.json", ingredients, work)


def follow_training(command: Sequence[str], log_file: Path, bar: tqdm) -> None:
    """Run fairseq-train with its output in a file and its progress on `bar`."""
    with (
        log_file.open("a") as output,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
            text=True,
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                output.write(line)
                show_progress(line, bar)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise RunError(failure(command, log_file))


def show_progress(line: str, bar: tqdm) -> None:
    """Bring the progress bar up to date with a line of the log."""
    phase = re.search(r"\| INFO \| (gradinit|train_inner) \| (\{.*\})", line)
    if phase is None:
        return
    values = json.loads(phase[2])
    if phase[1] == "gradinit":
        bar.set_postfix_str(f"GradInit: loss after the trial step {values['trial_loss']}")
    else:
        bar.update(int(values["num_updates"]) - bar.n)
        bar.set_postfix_str(f"loss {values['loss']}")


def show_examples(result: Result) -> None:
    """Sentences at even distances through the test set, so that none is picked."""
    log.info("\n== %d translations of: %s", EXAMPLES, result.arm.title)
    for row in result.rows[:: max(1, len(result.rows) // EXAMPLES)][:EXAMPLES]:
        for label in ("source", "reference", "translation"):
            log.info("%-11s  %s", label, getattr(row, label))
        log.info("")


def show_results(results: list[Result], settings: Settings) -> None:
    """The arms side by side."""
    table = {
        "": [result.arm.title for result in results],
        "BLEU": [f"{result.scores.bleu:.2f}" for result in results],
        "chrF2": [f"{result.scores.chrf:.2f}" for result in results],
        "validation loss (base 2)": [f"{result.valid_loss:.3f}" for result in results],
    }
    for part in (8, 4, 2):
        # The last logged update that all arms have up to this part of training.
        curves = [dict(result.curve) for result in results]
        shared = set.intersection(*map(set, curves))
        update = max((u for u in shared if u <= settings.updates // part), default=None)
        if update is not None:
            table[f"training loss at {update}"] = [f"{curve[update]:.2f}" for curve in curves]
    table["training, seconds"] = [f"{result.train_seconds:.0f}" for result in results]
    table["translation, seconds"] = [f"{result.translate_seconds:.0f}" for result in results]
    log.info("== results on the test set (%d sentences)", len(results[0].rows))
    for name, cells in table.items():
        log.info("%-24s  %s", name, "  ".join(f"{cell:>22}" for cell in cells))
    log.info("\nBLEU   %s\nchrF2  %s", *results[0].scores.signatures)


def show_files(settings: Settings, picture: Path, next_target: str) -> None:
    """Where things lie, and three commands to try next."""
    checkpoints = settings.checkpoints(settings.arms[0])
    log.info("\ncheckpoint  %s", checkpoints / "checkpoint_last.pt")
    log.info("scales      %s", checkpoints / SCALES_FILE)
    log.info("picture     %s", picture)
    interactive = [
        *program("interactive"),
        *(str(settings.corpus / "data-bin"), *PLUGIN, "--task", "translation"),
        *("--path", str(checkpoints / "checkpoint_last.pt"), "--beam", "4"),
        *("--source-lang", SOURCE, "--target-lang", TARGET, "--bpe", "sentencepiece"),
        *("--sentencepiece-model", str(settings.corpus / "subwords" / "joint.model")),
    ]
    log.info("\ntry next:")
    log.info("  echo 'Passwort vergessen?' | %s", shlex.join(interactive))
    log.info("  %s", next_target)
    log.info("  %s", shlex.join([*program("train"), *PLUGIN, "--help"]))


if __name__ == "__main__":
    sys.exit(main())
