"""Train grids of small models with fairseq's own program, and show what came of them.

    python benchmarks/training.py arms --corpus quickstart=quickstart-run/corpus --workers 2
    python benchmarks/training.py arms --table

The studies:

{studies}

A corpus is a folder that data-prep/prepare.py made; cases of corpora that are not given are left
out. Every run is one line of training-STUDY.jsonl: what is there is not run again, so the same
command resumes where it was interrupted. At the end, or at once with --table, it prints the tables
of what is kept and writes training-STUDY.png.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure
from record import REPOSITORY, RESULTS, Table
from training_report import (
    Grid,
    grid_tables,
    heat_maps,
    loss_curves,
    optimizer_name,
    rate_curves,
    report,
    settings_tables,
    share_tables,
    study_corpus,
)

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.results import RunRecord, append_run, read_runs

# The recipes are no package: they are programs beside each other, as the benchmarks are.
sys.path += [str(REPOSITORY / "recipes"), str(REPOSITORY / "data-prep")]

from cases import Case, RunError
from checkpoints import CheckpointError
from corpora import Corpus
from quickstart import DECODING
from records import summary
from runner import ALL_SENTENCES, NO_READING_THREAD, PLUGIN, Run

log = logging.getLogger("training")

WORK = REPOSITORY / "quickstart-run" / "training"
VALIDATIONS = 10
LOG_LINES = 75

# As in recipes/quickstart.py. No workers for the data: each run is to stay on one core.
COMMON = (
    *("--task", "translation", "--source-lang", "de", "--target-lang", "en"),
    *("--arch", "transformer_gradinit_tiny", "--dropout", "0.1"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--weight-decay", "0.0001", "--lr-scheduler", "polynomial_decay"),
    *(*ALL_SENTENCES, *NO_READING_THREAD, "--num-workers", "0", "--log-format", "json"),
    *("--validate-interval", "100000", "--save-interval", "100000"),
)


@dataclass(frozen=True)
class Options:
    """Options for fairseq-train that go together, and what they are called in tables."""

    name: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """One way to start training."""

    name: str
    title: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setup:
    """How a corpus is trained on.

    Attributes:
        lr, warmup: the best ones for the default initialisation, as the study "warmup" has it.
    """

    corpus: str
    model: Options
    updates: int
    max_tokens: int
    lr: float
    warmup: int


def transformer(layers: int, width: int, ffn: int, heads: int) -> Options:
    """A model with both sides alike, instead of the architecture's 3+3 layers of width 256."""
    sizes = {"layers": layers, "embed-dim": width, "ffn-embed-dim": ffn, "attention-heads": heads}
    options = [
        word
        for side, (name, size) in product(("encoder", "decoder"), sizes.items())
        for word in (f"--{side}-{name}", str(size))
    ]
    return Options(f"{layers}+{layers} layers, d {width}", tuple(options))


def adam(beta2: float) -> Options:
    return Options(
        f"adam beta2 {beta2:g}", ("--optimizer", "adam", "--adam-betas", f"(0.9, {beta2:g})")
    )


# ---- The numbers of the studies.

QUICKSTART = Setup(
    "quickstart",
    Options("3+3 layers, d 256"),
    updates=1500,
    max_tokens=1000,
    lr=1e-3,
    warmup=375,
)
MULTI30K = Setup(
    "multi30k",
    transformer(layers=4, width=128, ffn=512, heads=4),
    updates=2000,
    max_tokens=1000,
    lr=2e-3,
    warmup=500,
)
SETUPS = (QUICKSTART, MULTI30K)

ADAM = adam(0.98)
SGD = Options("sgd momentum 0.9", ("--optimizer", "sgd", "--momentum", "0.9", "--clip-norm", "0"))

DEFAULT = Arm("default", "default, no warmup")
WARMUP = Arm("warmup", "default, warmup")
GRADINIT = Arm("gradinit", "GradInit, no warmup", ("--gradinit",))
DEFAULT_SHORT = replace(DEFAULT, title="default, short warmup")
GRADINIT_SHORT = replace(GRADINIT, title="GradInit, short warmup")

SEEDS = (1, 2, 3)

WARMUP_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
WARMUP_PARTS = (8, 4, 2)
"""The updates are divided by these."""

SHORT_WARMUPS = (25, 50, 100)

STABILITY_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
STABILITY_BETA2S = (0.9, 0.95, 0.98, 0.999)
STABILITY_SETUP = replace(MULTI30K, updates=800)

SGD_RATES = tuple(2.0**power for power in range(-5, 2))

VARIANTS_SETUP = MULTI30K
VARIANTS_RATES = (MULTI30K.lr,)
VARIANTS = {
    "default preset": (),
    "no centering": ("--gradinit-centering", "off"),
    "encoder branches learned": ("--gradinit-encoder-branches", "1"),
    "neither": ("--gradinit-centering", "off", "--gradinit-encoder-branches", "1"),
    "scales not learned": ("--gradinit-iterations", "1", "--gradinit-lr", "1e-9"),
    "norm gains learned": ("--gradinit-norm-gains", "learned"),
    "eta 3 lr": ("--gradinit-eta", f"{3 * MULTI30K.lr:g}"),
    "paper preset": ("--gradinit-preset", "paper"),
}

TRANSFER_SETUP = MULTI30K
TRANSFER_SEEDS = (2, 3)
TRANSFER_FROM = {
    "seed 1": MULTI30K,
    "d 64": replace(MULTI30K, model=transformer(layers=4, width=64, ffn=256, heads=4)),
    "d 256": replace(MULTI30K, model=transformer(layers=4, width=256, ffn=1024, heads=4)),
    "the other corpus": replace(MULTI30K, corpus=QUICKSTART.corpus),
}

ITERATIONS = (15, 30, 200, 780)
"""Beside the 60 of the default preset, which the study "arms" has."""

SIZES = (
    replace(
        MULTI30K,
        model=transformer(layers=12, width=128, ffn=512, heads=4),
        updates=1000,
        lr=1e-3,
        warmup=250,
    ),
    replace(
        MULTI30K,
        model=transformer(layers=6, width=512, ffn=2048, heads=8),
        updates=600,
        lr=5e-4,
        warmup=150,
    ),
)

# ---- The studies.


@dataclass(frozen=True)
class Study:
    """A question, the runs that answer it, and how they are shown."""

    name: str
    question: str
    cases: tuple[Case, ...]
    tables: Callable[[Sequence[RunRecord]], list[Table]]
    picture: Callable[[Sequence[RunRecord]], Figure]


def case(
    setup: Setup,
    arm: Arm,
    *,
    lr: float | None = None,
    warmup: int | None = None,
    optimizer: Options = ADAM,
    scored: bool = False,
    scales_of: Case | None = None,
) -> Case:
    """A case as the setup has it, without warmup except for the arm that is named for it.

    Its corpus is a name until it is run.

    Args:
        lr: the peak of the schedule, which falls to 0 in a line at the last update.
        scored: whether the test set is translated and scored.
    """
    if warmup is None:
        warmup = setup.warmup if arm == WARMUP else 0
    length = str(setup.updates)
    return Case(
        recipe=f"{setup.corpus}/{arm.name}",
        title=arm.title,
        model=setup.model.name,
        corpus=setup.corpus,
        source="de",
        target="en",
        pieces="sentencepiece",
        options=(
            *(*PLUGIN, *COMMON),
            *("--lr", f"{setup.lr if lr is None else lr:g}", "--warmup-updates", f"{warmup}"),
            *("--total-num-update", length, "--max-update", length),
            *("--validate-interval-updates", f"{max(1, setup.updates // VALIDATIONS)}"),
            *("--log-interval", f"{max(1, setup.updates // LOG_LINES)}"),
            *("--max-tokens", f"{setup.max_tokens}"),
            *(*setup.model.options, *optimizer.options, *arm.options),
            "--no-epoch-checkpoints" if scored else "--no-save",
        ),
        tokens_per_batch=setup.max_tokens,
        decoding=DECODING,
        subsets=("test",) if scored else (),
        scales_of=scales_of,
    )


def with_seeds(cases: Iterable[Case], seeds: Sequence[int]) -> tuple[Case, ...]:
    """Each setting with each seed; one seed of all before the next."""
    kinds = dict.fromkeys(replace(case, seed=0) for case in cases)
    return tuple(replace(kind, seed=seed) for seed in seeds for kind in kinds)


def variant_arms() -> list[Arm]:
    """GradInit with more options."""
    return [
        Arm(name.replace(" ", "-"), f"GradInit, {name}", (*GRADINIT.options, *options))
        for name, options in VARIANTS.items()
    ]


def transfer_cases() -> Iterator[Case]:
    """Scales that were learned for another run, of seed 1."""
    for name, setup in TRANSFER_FROM.items():
        arm = Arm(f"scales-of-{name.replace(' ', '-')}", f"GradInit, scales of {name}")
        other = case(setup, GRADINIT, lr=TRANSFER_SETUP.lr)
        yield case(TRANSFER_SETUP, replace(arm, options=GRADINIT.options), scales_of=other)


def iteration_cases() -> Iterator[Case]:
    """Scales that took more or fewer iterations, at the best rates and at twice these."""
    for setup, factor, count in product(SETUPS, (1, 2), ITERATIONS):
        options = (*GRADINIT.options, "--gradinit-iterations", str(count))
        arm = Arm(f"{count}-iterations", f"GradInit, {count} iterations", options)
        yield case(setup, arm, lr=factor * setup.lr)


def label(case: Case) -> str:
    """What `--only` searches, and what progress is reported with."""
    found = case.settings
    schedule = f"lr {found.lr:g} warmup {found.warmup}"
    name = case.recipe.replace("/", " ")
    return f"{name} {schedule} {optimizer_name(found)} seed {case.seed}"


def corpora_of(case: Case) -> set[str]:
    """The names of those that a run reads."""
    return {case.corpus, *(corpora_of(case.scales_of) if case.scales_of else ())}


LENGTHS = Grid(
    lambda r: f"{study_corpus(r)}, {r.settings.model}",
    lambda r: str(r.settings.warmup),
    "warmup updates",
)
STARTS = Grid(
    lambda r: f"{study_corpus(r)}, {r.settings.model}",
    lambda r: f"{r.title} ({r.settings.warmup})",
    "start",
)
BETAS = Grid(lambda r: r.title, lambda r: optimizer_name(r.settings), "optimizer")

STUDIES = {
    study.name: study
    for study in (
        Study(
            "warmup",
            "which learning rate and length of warmup suit the default initialisation best?",
            tuple(
                case(setup, WARMUP, lr=rate, warmup=setup.updates // part)
                for setup, part, rate in product(SETUPS, WARMUP_PARTS, WARMUP_RATES)
            ),
            partial(grid_tables, grid=LENGTHS),
            partial(heat_maps, grid=LENGTHS),
        ),
        Study(
            "arms",
            "does GradInit do without warmup what the default initialisation does with it?",
            with_seeds(
                (
                    case(setup, arm, lr=factor * setup.lr, scored=True)
                    for setup, factor in product(SETUPS, (1, 2))
                    for arm in (DEFAULT, WARMUP, GRADINIT)
                ),
                SEEDS,
            ),
            settings_tables,
            loss_curves,
        ),
        Study(
            "short",
            "how short may warmup be at twice the best rate, with GradInit and without?",
            with_seeds(
                (
                    case(setup, arm, lr=2 * setup.lr, warmup=updates)
                    for setup in SETUPS
                    for updates in SHORT_WARMUPS
                    for arm in (DEFAULT_SHORT, GRADINIT_SHORT)
                ),
                SEEDS,
            ),
            partial(grid_tables, grid=STARTS),
            partial(heat_maps, grid=STARTS),
        ),
        Study(
            "stability",
            "at which learning rates and beta2 does a model train without warmup?",
            tuple(
                case(STABILITY_SETUP, arm, lr=rate, optimizer=adam(beta2))
                for arm in (DEFAULT, GRADINIT)
                for beta2, rate in product(STABILITY_BETA2S, STABILITY_RATES)
            ),
            partial(share_tables, grid=BETAS),
            partial(heat_maps, grid=BETAS),
        ),
        Study(
            "sgd",
            "can a post-LN Transformer be trained by SGD with momentum?",
            tuple(
                case(MULTI30K, arm, lr=rate, optimizer=SGD)
                for rate, arm in product(SGD_RATES, (DEFAULT, WARMUP, GRADINIT))
            ),
            settings_tables,
            rate_curves,
        ),
        Study(
            "variants",
            "what do the options of GradInit change?",
            with_seeds(
                (
                    case(VARIANTS_SETUP, arm, lr=rate)
                    for rate, arm in product(VARIANTS_RATES, variant_arms())
                ),
                SEEDS,
            ),
            settings_tables,
            loss_curves,
        ),
        Study(
            "transfer",
            "do scales serve another seed, width or corpus?",
            with_seeds(transfer_cases(), TRANSFER_SEEDS),
            settings_tables,
            loss_curves,
        ),
        Study(
            "iterations",
            "for how long does it pay to learn the scales?",
            with_seeds(iteration_cases(), SEEDS),
            settings_tables,
            loss_curves,
        ),
        Study(
            "sizes",
            "does it hold for deeper and for wider models?",
            tuple(case(setup, arm) for setup in SIZES for arm in (WARMUP, GRADINIT, DEFAULT)),
            settings_tables,
            loss_curves,
        ),
    )
}


# ---- The program.


def kept_runs(
    cases: Sequence[Case], runs: Iterable[RunRecord], corpora: Mapping[str, Corpus]
) -> list[RunRecord]:
    """The runs to show: those of a study, of any seed, on its corpora as they are now.

    A corpus that is not given is as it was in its last run.
    """
    titles = {(case.recipe, case.settings): case.title for case in cases}
    digests = {study_corpus(run): run.corpus_digest for run in runs}
    digests |= {name: corpus.digest for name, corpus in corpora.items()}
    found = [
        replace(run, title=titles[kind])
        for run in runs
        if (kind := (run.recipe, run.settings)) in titles
        and run.corpus_digest == digests[study_corpus(run)]
    ]
    order = list(titles)
    return sorted(found, key=lambda run: (order.index((run.recipe, run.settings)), run.seed))


def show(study: Study, runs: Sequence[RunRecord], results: Path) -> None:
    """Print the tables, and write the picture."""
    if not runs:
        log.info("no runs of this study are kept in %s", results)
        return
    print(report(study.tables(runs), runs, f"python benchmarks/training.py {study.name}"), end="")
    path = results / f"training-{study.name}.png"
    study.picture(runs).savefig(path, dpi=120)
    log.info("picture: %s", path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    studies = "\n".join(f"    {study.name:10} {study.question}" for study in STUDIES.values())
    parser = argparse.ArgumentParser(
        description=str(__doc__).replace("{studies}", studies),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one core each")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of what --list prints")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of the study")
    parser.add_argument("--list", action="store_true", help="print the runs, and run nothing")
    parser.add_argument("--table", action="store_true", help="show what is kept, and run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for logs and checkpoints")
    options = parser.parse_args(arguments)
    options.corpus = dict(pair.partition("=")[::2] for pair in options.corpus)
    if not all(options.corpus.values()):
        parser.error("--corpus takes NAME=DIR, such as quickstart=quickstart-run/corpus")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("runner").setLevel(logging.WARNING)
    options = parse(arguments)
    try:
        conduct(STUDIES[options.study], options)
    except (CheckpointError, GradInitError, RunError, OSError) as error:
        log.error("training: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("training: interrupted; the same command resumes here")
        return 130
    return 0


def conduct(study: Study, options: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        CheckpointError, GradInitError, OSError, RunError: a run failed, or a file cannot be used.
    """
    chosen = with_seeds(study.cases, options.seeds) if options.seeds else study.cases
    chosen = tuple(case for case in chosen if options.only in label(case))
    corpora = {name: Corpus.read(Path(path).resolve()) for name, path in options.corpus.items()}
    file = options.results / f"training-{study.name}.jsonl"

    def kept() -> list[RunRecord]:
        return kept_runs(study.cases, read_runs([file]) if file.exists() else [], corpora)

    done = {(run.recipe, run.settings, run.seed) for run in kept()}
    missing = [c for c in chosen if (c.recipe, c.settings, c.seed) not in done]
    if options.list:
        for case in chosen:
            print(f"{label(case)}{'' if case in missing else ', kept'}")
        return
    if not options.table:
        needed = dict.fromkeys(name for case in chosen for name in sorted(corpora_of(case)))
        for name in (name for name in needed if name not in corpora):
            log.info("no --corpus %s=DIR is given: its runs are left out", name)
        log.info("%d runs, %d of them kept from before", len(chosen), len(chosen) - len(missing))
        todo = [case for case in missing if corpora_of(case) <= corpora.keys()]
        runs = [prepared(case, corpora, options.work.resolve()) for case in todo]
        run_all(runs, file, options.workers)
    show(study, kept(), options.results)


def prepared(case: Case, corpora: Mapping[str, Corpus], work: Path) -> Run:
    """A case on the corpora that were given, in a folder of its own."""

    def placed(case: Case) -> Case:
        other = placed(case.scales_of) if case.scales_of else None
        return replace(case, corpus=str(corpora[case.corpus].folder), scales_of=other)

    digest = sha256(repr(case).encode()).hexdigest()
    return Run(placed(case), work / f"{label(case).replace(' ', '-')}-{digest[:8]}", threads=1)


def run_all(runs: Sequence[Run], file: Path, workers: int) -> None:
    """Carry out runs side by side, and keep the record of each as soon as it has ended.

    Raises:
        RunError: a run failed; those beside it have ended and are kept, no others were started.
    """
    lock, stopped = threading.Lock(), threading.Event()
    start, done = time.monotonic(), 0

    def work(run: Run) -> None:
        nonlocal done
        if stopped.is_set():
            return
        try:
            record = run.carry_out()
            assert record is not None
        except RunError as error:
            stopped.set()
            raise RunError(f"{label(run.case)}: {error}") from error
        except BaseException:
            stopped.set()
            raise
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        with lock:
            append_run(file, record)
            done += 1
            what = f"{label(run.case)}: {summary(record)}"
            log.info("%s; %s", what, progress(done, len(runs), time.monotonic() - start))

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, run) for run in runs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # Ctrl-C, which has reached fairseq's programs too
            stopped.set()
            raise


def progress(done: int, count: int, elapsed: float) -> str:
    """How many runs have ended, and how long the others will take if they are like these."""
    left = timedelta(seconds=round(elapsed / done * (count - done)))
    so_far = timedelta(seconds=round(elapsed))
    estimate = f", about {left} to go" if done < count else ""
    return f"{done} of {count} after {so_far}{estimate}"


if __name__ == "__main__":
    sys.exit(main())
