"""From raw text to BLEU with GradInit: the program behind `make quickstart`.

Prepares a German-English corpus, trains a small post-LN Transformer without warmup on what
GradInit made of its initialisation, translates the test set, and scores it. With --compare it
trains the same model from the default initialisation too, without warmup and with it, and shows
the three side by side, each for fewer updates. Trainings are as long as fits in --minutes on this
machine. Run again, it resumes where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cases import Case, RunError
from checkpoints import CheckpointError
from corpora import Row, read_translations
from programs import execute, shown
from runner import (
    ALL_SENTENCES,
    NO_READING_THREAD,
    PLUGIN,
    Run,
    prepare,
)
from tqdm import tqdm
from training_log import TrainingLog

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.report.plot import save_picture
from fairseq_gradinit.results import RunRecord
from fairseq_gradinit.scales import SCALES_FILE, Scales
from fairseq_gradinit.storage import write_atomically

log = logging.getLogger("quickstart")

ROOT = Path(__file__).resolve().parent.parent
SEED = 1
EXAMPLES = 10

MINUTES = {1: 8.0, 3: 12.0}
"""Of training, for one arm and for three: with corpus and translation at most 15."""
FEWEST_UPDATES = {1: 500, 3: 200}
"""One arm has BLEU 10 then; of three the losses tell who is ahead."""
GRADINIT_UPDATES = 115
"""That many updates take as long as GradInit."""
TIMED_UPDATES = 30

MODEL = ("--arch", "transformer_gradinit_tiny", "--dropout", "0.1")
TRAINING = (
    *("--task", "translation", "--source-lang", "de", "--target-lang", "en"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--weight-decay", "0.0001"),
    *("--lr", "0.001", "--lr-scheduler", "polynomial_decay"),
    *("--max-tokens", "1000", *ALL_SENTENCES),
)
# Keeps a state to resume from every 200 updates, and only the last of them.
HOUSEKEEPING = (
    *("--save-interval-updates", "200", "--keep-interval-updates", "1", "--no-epoch-checkpoints"),
    *("--validate-interval", "1000", "--num-workers", "1", *NO_READING_THREAD),
    *("--log-format", "json", "--log-interval", "20"),
)
DECODING = ("--beam", "4", "--max-len-a", "1.5", "--max-len-b", "10", "--max-tokens", "4000")


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        run_dir: folder for everything that the program makes.
        updates: length of training.
        seed: of initialisation, data order and dropout.
        threads: of each program; None leaves it to the user's OMP_NUM_THREADS, or to torch.
    """

    run_dir: Path
    updates: int
    seed: int
    threads: int | None = None

    @property
    def corpus(self) -> Path:
        return self.run_dir / "corpus"

    def cases(self) -> tuple[Case, Case, Case]:
        """GradInit, and the default initialisation without and with warmup."""
        warmup = self.updates // 4
        return (
            self._case("gradinit", "GradInit, no warmup", 0, "--gradinit"),
            self._case("no-warmup", "default, no warmup", 0),
            self._case("warmup", f"default, warmup {warmup}", warmup),
        )

    def _case(self, arm: str, title: str, warmup: int, *options: str) -> Case:
        length = str(self.updates)
        return Case(
            recipe=f"quickstart/{arm}",
            title=title,
            model="3+3 layers, d 256",
            corpus=str(self.corpus),
            source="de",
            target="en",
            pieces="sentencepiece",
            options=(
                *(*PLUGIN, *options, "--warmup-updates", str(warmup), *MODEL, *TRAINING),
                *("--total-num-update", length, "--max-update", length, *HOUSEKEEPING),
            ),
            tokens_per_batch=1000,
            seed=self.seed,
            decoding=DECODING,
        )

    @property
    def outcome(self) -> Path:
        """Apart for each length and seed, so that trying another one loses nothing."""
        return self.run_dir / f"{self.updates}-updates-seed-{self.seed}"

    def run(self, case: Case) -> Run:
        folder = self.outcome / case.recipe.partition("/")[2]
        return Run(case, folder, threads=self.threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    options = parse(arguments)
    try:
        conduct(options)
    except (CheckpointError, GradInitError, RunError, OSError) as error:
        log.error("quickstart: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("quickstart: interrupted; the same command resumes here")
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--compare", action="store_true", help="train the default init too")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "quickstart-run")
    length = parser.add_mutually_exclusive_group()
    default = f"{MINUTES[1]:g}; with --compare {MINUTES[3]:g}"
    length.add_argument("--minutes", type=float, help=f"of training, in all (default: {default})")
    length.add_argument("--updates", type=int, help="of each training, instead of --minutes")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--mirror", help="folder that holds the corpus's wheels")
    options = parser.parse_args(arguments)
    for name in ("minutes", "updates"):
        if (value := getattr(options, name)) is not None and value <= 0:
            parser.error(f"--{name} must be more than 0")
    return options


def conduct(options: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        CheckpointError, GradInitError, OSError, RunError: a step failed.
    """
    start = time.monotonic()
    settings = Settings(options.run_dir.absolute(), options.updates or 1, options.seed)
    log.info("\n== corpus: raw text to binarised data")
    prepare(settings.cases()[0], "quickstart", options.mirror)
    corpus_seconds = time.monotonic() - start
    arms = 3 if options.compare else 1
    if options.updates is None:
        settings = fitting(settings, arms, options.minutes or MINUTES[arms])
    runs = [settings.run(case) for case in settings.cases()[:arms]]
    records = [train_and_score(run, settings) for run in runs]
    picture = settings.outcome / ("compare.png" if options.compare else "quickstart.png")
    curves = {record.title: known(record.training) for record in records}
    save_picture(picture, curves, Scales.load(runs[0].checkpoints / SCALES_FILE))
    rows = read_translations(runs[0].folder / "generate-test.txt", settings.corpus)
    show_examples(records[0].title, rows)
    show_results(records, len(rows))
    log.info("corpus: %.0f s; in all: %.0f s", corpus_seconds, time.monotonic() - start)
    show_files(settings, picture, "make test" if options.compare else "make quickstart-compare")


def fitting(settings: Settings, arms: int, minutes: float) -> Settings:
    """The length and the threads with which all trainings take that many minutes here.

    Both are measured once and kept, so that what was interrupted can resume. Beside another busy
    program, two threads on two cores can be slower than one.
    """
    kept = settings.run_dir / f"updates-of-{arms}-in-{minutes:g}-minutes.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        return replace(settings, updates=found["updates"], threads=found["threads"])
    log.info("\n== how fast is this machine? %d updates tell", TIMED_UPDATES)
    choices = (None,) if "OMP_NUM_THREADS" in os.environ else (None, 1)
    speeds = {
        threads: updates_per_second(replace(settings, threads=threads)) for threads in choices
    }
    threads = max(choices, key=speeds.__getitem__)
    per_second = speeds[threads]
    updates = max(planned(per_second, arms, minutes), FEWEST_UPDATES[arms])
    expected = (arms * updates + GRADINIT_UPDATES) / per_second / 60
    length = f"{updates} updates" + (f" for each of {arms} trainings" if arms > 1 else "")
    log.info("%.1f updates a second here: %s, about %.0f minutes", per_second, length, expected)
    if expected > 1.1 * minutes:
        log.info("That is longer than %g minutes: fewer updates would show nothing.", minutes)
    found = {"updates": updates, "threads": threads, "updates_per_second": per_second}
    write_atomically(kept, json.dumps(found) + "\n")
    return replace(settings, updates=updates, threads=threads)


def planned(per_second: float, arms: int, minutes: float) -> int:
    """How many updates each training has, of which one begins with GradInit; whole tens."""
    return math.floor((per_second * 60 * minutes - GRADINIT_UPDATES) / arms / 10) * 10


def updates_per_second(settings: Settings) -> float:
    """Of a short training from the default initialisation."""
    case = settings.cases()[1]
    short = ("--max-update", str(TIMED_UPDATES), "--log-interval", "5")
    with tempfile.TemporaryDirectory(dir=settings.run_dir) as folder:
        log_file = Path(folder, "train.log")
        execute(
            [
                *("fairseq-train", str(settings.corpus / "data-bin"), *case.options, *short),
                *("--no-save", "--disable-validation", "--save-dir", folder),
            ],
            log_file,
            threads=settings.threads,
        )
        seconds = TrainingLog.read(log_file).seconds_per_update
    if seconds is None:
        raise RunError(f"a training of {TIMED_UPDATES} updates did not say how long they took")
    return 1 / seconds


def train_and_score(run: Run, settings: Settings) -> RunRecord:
    """Carry out a case, with a progress bar.

    Raises:
        RunError: a step failed, or training diverged.
    """
    log.info("\n== %s", run.case.title)
    total = run.case.settings.updates
    with tqdm(total=total, desc=run.case.title, unit="update", mininterval=5) as bar:
        run.watch = partial(show_progress, bar=bar)
        record = run.carry_out(results=settings.run_dir / "results.jsonl")
    if record is None or record.status == "diverged":
        raise RunError(f"{run.case.title}: training diverged, see {run.log_file('train')}")
    return record


def known(curve: Sequence[tuple[int, float | None]]) -> list[tuple[int, float]]:
    """Without losses that were not finite."""
    return [(update, loss) for update, loss in curve if loss is not None]


def show_progress(printed: str, bar: tqdm) -> None:
    """Bring the progress bar up to date with what was logged."""
    for phase, text in re.findall(r"\| INFO \| (gradinit|train_inner) \| (\{.*\})", printed):
        values = json.loads(text)
        if phase == "gradinit":
            bar.set_postfix_str(f"GradInit: loss after the trial step {values['trial_loss']}")
        else:
            bar.update(int(values["num_updates"]) - bar.n)
            bar.set_postfix_str(f"loss {values['loss']}")


def show_examples(title: str, rows: Sequence[Row]) -> None:
    """Sentences at even distances through the test set, so that none is picked."""
    log.info("\n== %d translations of: %s", EXAMPLES, title)
    for row in rows[:: max(1, len(rows) // EXAMPLES)][:EXAMPLES]:
        for label in ("source", "reference", "translation"):
            log.info("%-11s  %s", label, getattr(row, label))
        log.info("")


def show_results(records: Sequence[RunRecord], sentences: int) -> None:
    """The arms side by side."""
    table = {
        "": [record.title for record in records],
        "BLEU": [f"{record.scores[0].bleu:.2f}" for record in records],
        "chrF2": [f"{record.scores[0].chrf:.2f}" for record in records],
        "validation loss (base 2)": [f"{record.valid_loss:.3f}" for record in records],
    }
    for part in (8, 4, 2):
        # The last logged update that all arms have up to this part of training.
        curves = [dict(known(record.training)) for record in records]
        shared = set.intersection(*map(set, curves))
        limit = records[0].settings.updates // part
        update = max((u for u in shared if u <= limit), default=None)
        if update is not None:
            table[f"training loss at {update}"] = [f"{curve[update]:.2f}" for curve in curves]
    table["training, seconds"] = [f"{record.seconds:.0f}" for record in records]
    log.info("== results on the test set (%d sentences)", sentences)
    for name, cells in table.items():
        log.info("%-24s  %s", name, "  ".join(f"{cell:>22}" for cell in cells))
    log.info("\nBLEU   %s\nchrF2  %s", *records[0].scores[0].signatures)


def show_files(settings: Settings, picture: Path, next_target: str) -> None:
    """Where things are, and commands to try next."""
    checkpoints = settings.run(settings.cases()[0]).checkpoints
    results = settings.run_dir / "results.jsonl"
    log.info("\ncheckpoint  %s", checkpoints / "checkpoint_last.pt")
    log.info("scales      %s", checkpoints / SCALES_FILE)
    log.info("picture     %s", picture)
    log.info("records     %s", results)
    interactive = [
        *("fairseq-interactive", str(settings.corpus / "data-bin"), *PLUGIN),
        *("--task", "translation", "--path", str(checkpoints / "checkpoint_last.pt")),
        *("--beam", "4", "--source-lang", "de", "--target-lang", "en", "--bpe", "sentencepiece"),
        *("--sentencepiece-model", str(settings.corpus / "subwords" / "joint.model")),
    ]
    log.info("\ntry next:")
    log.info("  echo 'Passwort vergessen?' | %s", shown(interactive))
    log.info("  %s", next_target)
    log.info("  %s", shown(["fairseq-gradinit", "table", str(results)]))
    log.info("  %s", shown(["fairseq-train", *PLUGIN, "--help"]))


if __name__ == "__main__":
    sys.exit(main())
