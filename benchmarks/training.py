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
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from record import REPOSITORY, RESULTS, Table
from training_report import (
    Grid,
    grid_tables,
    heat_maps,
    loss_curves,
    rate_curves,
    report,
    settings,
    settings_tables,
    share_tables,
)
from training_runs import (
    Arm,
    Case,
    Corpus,
    Options,
    Run,
    RunError,
    Runner,
    RunsFile,
    run_all,
)

from fairseq_gradinit.errors import GradInitError

log = logging.getLogger("training")

WORK = REPOSITORY / "quickstart-run" / "training"


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

DEFAULT = Arm("default", "default, no warmup", "#c0392b")
WARMUP = Arm("warmup", "default, warmup", "#1b3a6b")
GRADINIT = Arm("gradinit", "GradInit, no warmup", "#e8a33d", ("--gradinit",))
DEFAULT_SHORT = replace(DEFAULT, title="default, short warmup")
GRADINIT_SHORT = replace(GRADINIT, title="GradInit, short warmup")

SEEDS = (1, 2, 3)

WARMUP_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
WARMUP_PARTS = (8, 4, 2)
"""The updates are divided by these."""

SHORT_WARMUPS = (25, 50, 100)

STABILITY_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
STABILITY_BETA2S = (0.9, 0.95, 0.98, 0.999)
STABILITY_UPDATES = 800

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
    "seed 1": {"seed": 1},
    "d 64": {"seed": 1, "model": transformer(layers=4, width=64, ffn=256, heads=4)},
    "d 256": {"seed": 1, "model": transformer(layers=4, width=256, ffn=1024, heads=4)},
    "the other corpus": {"seed": 1, "corpus": QUICKSTART.corpus},
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
    tables: Callable[[Sequence[Run]], list[Table]]
    picture: Callable[[Sequence[Run]], Figure]


def case(setup: Setup, arm: Arm, **changes: Any) -> Case:
    """A case as the setup has it, without warmup but for the arm that is named for it."""
    usual = Case(
        corpus=setup.corpus,
        arm=arm,
        model=setup.model,
        optimizer=ADAM,
        lr=setup.lr,
        warmup=setup.warmup if arm == WARMUP else 0,
        updates=setup.updates,
        max_tokens=setup.max_tokens,
    )
    return replace(usual, **changes)


def with_seeds(cases: Iterable[Case], seeds: Sequence[int]) -> tuple[Case, ...]:
    """Each setting with each seed; one seed of all before the next."""
    kinds = dict.fromkeys(map(settings, cases))
    return tuple(replace(kind, seed=seed) for seed in seeds for kind in kinds)


def variant_arms() -> list[Arm]:
    """GradInit with more options, in matplotlib's colours one after the other."""
    return [
        Arm(name.replace(" ", "-"), f"GradInit, {name}", f"C{i}", ("--gradinit", *options))
        for i, (name, options) in enumerate(VARIANTS.items())
    ]


def transfer_cases() -> Iterator[Case]:
    """Scales that were learned for another run."""
    for i, (name, changes) in enumerate(TRANSFER_FROM.items()):
        arm = Arm(f"scales-of-{name.replace(' ', '-')}", f"GradInit, scales of {name}", f"C{i}")
        other = case(TRANSFER_SETUP, GRADINIT, **changes)
        yield case(TRANSFER_SETUP, replace(arm, options=GRADINIT.options), scales_of=other)


def iteration_cases() -> Iterator[Case]:
    """Scales that took more or fewer iterations, at the best rates and at twice these."""
    for setup, factor in product(SETUPS, (1, 2)):
        for i, count in enumerate(ITERATIONS):
            arm = Arm(f"{count}-iterations", f"GradInit, {count} iterations", f"C{i}")
            options = (*GRADINIT.options, "--gradinit-iterations", str(count))
            yield case(setup, replace(arm, options=options), lr=factor * setup.lr)


LENGTHS = Grid(lambda c: f"{c.corpus}, {c.model.name}", lambda c: str(c.warmup), "warmup updates")
STARTS = Grid(
    lambda c: f"{c.corpus}, {c.model.name}", lambda c: f"{c.arm.title} ({c.warmup})", "start"
)
BETAS = Grid(lambda c: c.arm.title, lambda c: c.optimizer.name, "optimizer")

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
                case(MULTI30K, arm, lr=rate, optimizer=adam(beta2), updates=STABILITY_UPDATES)
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
    cases: Sequence[Case], runs: Iterable[Run], corpora: Mapping[str, Corpus]
) -> list[Run]:
    """The runs to show: those of a study, of any seed, on its corpora as they are now.

    A corpus that is not given is as it was in its last run.
    """
    kinds = {settings(case): case for case in cases}
    digests = {run.case.corpus: run.corpus_digest for run in runs}
    digests |= {name: corpus.digest for name, corpus in corpora.items()}
    found = {}
    for run in runs:
        kind = kinds.get(settings(run.case))
        if kind and run.corpus_digest == digests[run.case.corpus]:
            # With the titles and colours of today.
            case = replace(kind, seed=run.case.seed)
            found[case] = replace(run, case=case)
    order = list(kinds)
    return sorted(found.values(), key=lambda run: (order.index(settings(run.case)), run.case.seed))


def show(study: Study, runs: Sequence[Run], results: Path) -> None:
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
    options = parse(arguments)
    try:
        conduct(STUDIES[options.study], options)
    except (RunError, GradInitError) as error:
        log.error("training: %s", error)
        return 1
    except KeyboardInterrupt:
        log.error("training: interrupted; the same command resumes here")
        return 130
    return 0


def conduct(study: Study, options: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        GradInitError, RunError: a run failed, or a file cannot be used.
    """
    cases = study.cases
    chosen = with_seeds(cases, options.seeds) if options.seeds else cases
    chosen = tuple(case for case in chosen if options.only in case.label)
    corpora = {name: Corpus.read(Path(path).resolve()) for name, path in options.corpus.items()}
    file = RunsFile(options.results / f"training-{study.name}.jsonl")
    kept = {run.case for run in kept_runs(cases, file.read(), corpora)}
    if options.list:
        for case in chosen:
            print(f"{case.label}{', kept' if case in kept else ''}")
        return
    if not options.table:
        run_missing(chosen, kept, corpora, file, options)
    show(study, kept_runs(cases, file.read(), corpora), options.results)


def run_missing(
    chosen: Sequence[Case],
    kept: set[Case],
    corpora: Mapping[str, Corpus],
    file: RunsFile,
    options: argparse.Namespace,
) -> None:
    """Run what is chosen and not kept.

    Raises:
        RunError: a run failed.
    """
    needed = dict.fromkeys(chain.from_iterable(case.corpora for case in chosen))
    for name in (name for name in needed if name not in corpora):
        log.info("no --corpus %s=DIR is given: its runs are left out", name)
    todo = [case for case in chosen if case.corpora <= corpora.keys() and case not in kept]
    log.info("%d runs, %d of them kept from before", len(chosen), len(kept & set(chosen)))
    run_all(todo, Runner(corpora, options.work.resolve()), file, options.workers)


if __name__ == "__main__":
    sys.exit(main())
