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
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cases import Case, RunError
from corpora import Row, read_translations
from programs import execute, shown
from runner import ALL_SENTENCES, NO_READING_THREAD, PLUGIN, Run, prepare
from tqdm import tqdm
from training_log import TrainingLog

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.report.figures import save_picture
from fairseq_gradinit.results import RunRecord
from fairseq_gradinit.scales import SCALES_FILE, Scales
from fairseq_gradinit.storage import write_atomically

log = logging.getLogger("quickstart")

ROOT = Path(__file__).resolve().parent.parent
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


def arms(options: argparse.Namespace, updates: int, threads: int | None = None) -> list[Run]:
    """From GradInit, and from the default initialisation without and with warmup."""
    # Apart for each length and seed, so that trying another one loses nothing.
    folder = options.run_dir / f"{updates}-updates-seed-{options.seed}"

    def run(arm: str, title: str, warmup: int, *words: str) -> Run:
        case = Case(
            recipe=f"quickstart/{arm}",
            title=title,
            model="3+3 layers, d 256",
            corpus=str(options.run_dir / "corpus"),
            source="de",
            target="en",
            pieces="sentencepiece",
            options=(
                *(*PLUGIN, *words, "--warmup-updates", f"{warmup}", *MODEL, *TRAINING),
                *("--total-num-update", f"{updates}", "--max-update", f"{updates}", *HOUSEKEEPING),
            ),
            tokens_per_batch=1000,
            seed=options.seed,
            decoding=DECODING,
        )
        return Run(case, folder / arm, threads=threads)

    warmup = updates // 4
    return [
        run("gradinit", "GradInit, no warmup", 0, "--gradinit"),
        run("no-warmup", "default, no warmup", 0),
        run("warmup", f"default, warmup {warmup}", warmup),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--compare", action="store_true", help="train the default init too")
    folder = ROOT / "quickstart-run"
    parser.add_argument("--run-dir", type=lambda text: Path(text).absolute(), default=folder)
    length = parser.add_mutually_exclusive_group()
    default = f"{MINUTES[1]:g}; with --compare {MINUTES[3]:g}"
    length.add_argument("--minutes", type=float, help=f"of training, in all (default: {default})")
    length.add_argument("--updates", type=int, help="of each training, instead of --minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mirror", help="folder that holds the corpus's wheels")
    try:
        conduct(parser.parse_args(arguments))
    except (GradInitError, OSError) as error:
        log.error("quickstart: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("quickstart: interrupted; the same command resumes here")
        return 130
    return 0


def conduct(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    start = time.monotonic()
    corpus, results = options.run_dir / "corpus", options.run_dir / "results.jsonl"
    log.info("\n== corpus: raw text to binarised data")
    prepare(arms(options, 1)[0].case, "quickstart", options.mirror)
    corpus_seconds = time.monotonic() - start
    count = 3 if options.compare else 1
    length = (options.updates, None) if options.updates else fitting(options, count)
    runs = arms(options, *length)[:count]
    records = [train_and_score(run, results) for run in runs]
    picture = runs[0].folder.with_name("compare.png" if options.compare else "quickstart.png")
    curves = {record.title: record.training for record in records}
    save_picture(picture, curves, Scales.load(runs[0].checkpoints / SCALES_FILE))
    rows = read_translations(runs[0].folder / "generate-test.txt", corpus)
    show_examples(records[0].title, rows)
    show_results(records, len(rows))
    log.info("corpus: %.0f s; in all: %.0f s", corpus_seconds, time.monotonic() - start)
    checkpoint = runs[0].checkpoints / "checkpoint_last.pt"
    log.info("\ncheckpoint  %s", checkpoint)
    log.info("scales      %s", runs[0].checkpoints / SCALES_FILE)
    log.info("picture     %s", picture)
    log.info("records     %s", results)
    interactive = [
        *("fairseq-interactive", str(corpus / "data-bin"), *PLUGIN),
        *("--task", "translation", "--path", str(checkpoint)),
        *("--beam", "4", "--source-lang", "de", "--target-lang", "en", "--bpe", "sentencepiece"),
        *("--sentencepiece-model", str(corpus / "subwords" / "joint.model")),
    ]
    log.info("\ntry next:")
    log.info("  echo 'Passwort vergessen?' | %s", shown(interactive))
    log.info("  %s", "make test" if options.compare else "make quickstart-compare")
    log.info("  %s", shown(["fairseq-gradinit", "table", str(results)]))


def fitting(options: argparse.Namespace, count: int) -> tuple[int, int | None]:
    """The updates and the threads with which `count` trainings fill the minutes here.

    Both are measured once and kept, so that what was interrupted can resume. Beside another busy
    program, two threads on two cores can be slower than one.
    """
    minutes = options.minutes or MINUTES[count]
    kept = options.run_dir / f"updates-of-{count}-in-{minutes:g}-minutes.json"
    if not kept.exists():
        log.info("\n== how fast is this machine? %d updates tell", TIMED_UPDATES)
        choices = (None,) if "OMP_NUM_THREADS" in os.environ else (None, 1)
        speeds = {threads: updates_per_second(arms(options, 1, threads)[1]) for threads in choices}
        threads = max(choices, key=speeds.__getitem__)
        per_second = speeds[threads]
        # In whole tens; one of the trainings begins with GradInit.
        fits = int((per_second * 60 * minutes - GRADINIT_UPDATES) / count / 10) * 10
        updates = max(fits, FEWEST_UPDATES[count])
        expected = (count * updates + GRADINIT_UPDATES) / per_second / 60
        length = f"{updates} updates" + (f" for each of {count} trainings" if count > 1 else "")
        log.info("%.1f updates a second here: %s, about %.0f minutes", per_second, length, expected)
        found = {"updates": updates, "threads": threads, "updates_per_second": per_second}
        write_atomically(kept, json.dumps(found) + "\n")
    found = json.loads(kept.read_text(encoding="utf-8"))
    return found["updates"], found["threads"]


def updates_per_second(run: Run) -> float:
    """Of a short training."""
    corpus = Path(run.case.corpus)
    short = ("--max-update", str(TIMED_UPDATES), "--log-interval", "5")
    with tempfile.TemporaryDirectory(dir=corpus.parent) as folder:
        log_file = Path(folder, "train.log")
        execute(
            [
                *("fairseq-train", str(corpus / "data-bin"), *run.case.options, *short),
                *("--no-save", "--disable-validation", "--save-dir", folder),
            ],
            log_file,
            threads=run.threads,
        )
        return 1 / TrainingLog.read(log_file).seconds_per_update


def train_and_score(run: Run, results: Path) -> RunRecord:
    """Carry out a case, with a progress bar."""
    log.info("\n== %s", run.case.title)
    total = run.case.settings.updates
    with tqdm(total=total, desc=run.case.title, unit="update", mininterval=5) as bar:
        run.watch = partial(show_progress, bar=bar)
        record = run.carry_out(results=results)
    if record.status == "diverged":
        raise RunError(f"{run.case.title}: training diverged, see {run.log_file('train')}")
    return record


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
        curves = [dict(record.training) for record in records]
        limit = records[0].settings.updates // part
        shared = [u for u in set.intersection(*map(set, curves)) if u <= limit]
        if shared:
            update = max(shared)
            table[f"training loss at {update}"] = [f"{curve[update]:.2f}" for curve in curves]
    table["training, seconds"] = [f"{record.seconds:.0f}" for record in records]
    log.info("== results on the test set (%d sentences)", sentences)
    for name, cells in table.items():
        log.info("%-24s  %s", name, "  ".join(f"{cell:>22}" for cell in cells))
    log.info("\nBLEU   %s\nchrF2  %s", *records[0].scores[0].signatures)


if __name__ == "__main__":
    sys.exit(main())
