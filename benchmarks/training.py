"""Train grids of small models with fairseq's own program, and show what came of them.

    python benchmarks/training.py arms --corpus quickstart=quickstart-run/corpus
    python benchmarks/training.py arms --table

docs/experiments.md has the questions that the studies answer. A corpus is a folder that
data-prep/prepare.py made; cases of corpora that are not given are left out. Every run is one line
of training-STUDY.jsonl: what is there is not run again. At the end, or at once with --table, the
tables of what is kept are printed, and their picture is written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import training_report as shown
from heat_map import draw
from matplotlib.figure import Figure
from record import REPOSITORY, RESULTS, Table, markdown_table

from fairseq_gradinit.results import RunRecord, append_run, read_runs, source
from fairseq_gradinit.results.tables import count

# The recipes are no package: they are programs beside each other, as the benchmarks are.
sys.path += [str(REPOSITORY / "recipes"), str(REPOSITORY / "data-prep")]

from cases import Case
from corpora import Corpus
from quickstart import DECODING
from records import summary
from runner import ALL_SENTENCES, NO_READING_THREAD, PLUGIN, Run

WORK = REPOSITORY / "quickstart-run" / "training"

# As in recipes/quickstart.py. No workers for the data: each run is to stay on one core.
COMMON = (
    *("--task", "translation", "--source-lang", "de", "--target-lang", "en"),
    *("--arch", "transformer_gradinit_tiny", "--dropout", "0.1"),
    *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
    *("--weight-decay", "0.0001", "--lr-scheduler", "polynomial_decay"),
    *(*ALL_SENTENCES, *NO_READING_THREAD, "--num-workers", "0", "--log-format", "json"),
    *("--validate-interval", "100000", "--save-interval", "100000", "--max-tokens", "1000"),
)


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
    updates: int
    lr: float
    warmup: int
    model: str
    model_options: tuple[str, ...] = ()


def transformer(layers: int, width: int) -> dict[str, Any]:
    """A model with both sides alike, instead of the architecture's 3+3 layers of width 256."""
    sizes = {"layers": layers, "embed-dim": width, "ffn-embed-dim": 4 * width, "attention-heads": 4}
    options = [
        word
        for side, (name, size) in product(("encoder", "decoder"), sizes.items())
        for word in (f"--{side}-{name}", str(size))
    ]
    return {"model": f"{layers}+{layers} layers, d {width}", "model_options": tuple(options)}


def adam(beta2: float) -> tuple[str, ...]:
    return "--optimizer", "adam", "--adam-betas", f"(0.9, {beta2:g})"


SGD = ("--optimizer", "sgd", "--momentum", "0.9", "--clip-norm", "0")

QUICKSTART = Setup("quickstart", updates=1500, lr=1e-3, warmup=375, model="3+3 layers, d 256")
MULTI30K = Setup("multi30k", updates=2000, lr=2e-3, warmup=500, **transformer(4, 128))
SETUPS = (QUICKSTART, MULTI30K)

DEFAULT = Arm("default", "default, no warmup")
WARMUP = Arm("warmup", "default, warmup")
GRADINIT = Arm("gradinit", "GradInit, no warmup", ("--gradinit",))


def more(name: str, *options: str) -> Arm:
    """GradInit with more options."""
    return Arm(name.replace(" ", "-"), f"GradInit, {name}", (*GRADINIT.options, *options))


def case(
    setup: Setup,
    arm: Arm,
    *,
    lr: float | None = None,
    warmup: int | None = None,
    optimizer: Sequence[str] = adam(0.98),
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
        model=setup.model,
        corpus=setup.corpus,
        source="de",
        target="en",
        pieces="sentencepiece",
        options=(
            *(*PLUGIN, *COMMON),
            *("--lr", f"{setup.lr if lr is None else lr:g}", "--warmup-updates", f"{warmup}"),
            *("--total-num-update", length, "--max-update", length),
            *("--validate-interval-updates", f"{max(1, setup.updates // 10)}"),
            *("--log-interval", f"{max(1, setup.updates // 75)}"),
            *(*setup.model_options, *optimizer, *arm.options),
            "--no-epoch-checkpoints" if scored else "--no-save",
        ),
        tokens_per_batch=1000,
        decoding=DECODING,
        subsets=("test",) if scored else (),
        scales_of=scales_of,
    )


@dataclass(frozen=True)
class Study:
    """Runs that answer a question, and how they are shown."""

    cases: Sequence[Case]
    seeds: Sequence[int] = (1,)
    tables: Callable[[Sequence[RunRecord]], list[Table]] = shown.settings_tables
    picture: Callable[[Sequence[RunRecord]], Figure] | None = None

    @property
    def runs(self) -> list[Case]:
        """Each case with each seed; one seed of all before the next."""
        return [replace(case, seed=seed) for seed in self.seeds for case in self.cases]


LENGTHS = shown.Grid(shown.corpus_and_model, lambda run: str(run.settings.warmup), "warmup updates")
STARTS = shown.Grid(
    shown.corpus_and_model, lambda run: f"{run.title} ({run.settings.warmup})", "start"
)
BETAS = shown.Grid(
    lambda run: run.title, lambda run: shown.optimizer_name(run.settings), "optimizer"
)

NOT_LEARNED = more("scales not learned", "--gradinit-iterations", "1", "--gradinit-lr", "1e-9")
SHORT = replace(MULTI30K, updates=800)
DEEP = replace(MULTI30K, updates=1000, lr=1e-3, warmup=250, **transformer(12, 128))
SCALES_OF = {
    "seed 1": MULTI30K,
    "d 64": replace(MULTI30K, **transformer(4, 64)),
    "d 256": replace(MULTI30K, **transformer(4, 256)),
    "the other corpus": replace(MULTI30K, corpus="quickstart"),
}
STUDIES = {
    "warmup": Study(
        [case(setup, WARMUP, warmup=setup.updates // part) for setup in SETUPS for part in (8, 2)],
        tables=partial(shown.grid_tables, grid=LENGTHS),
    ),
    "arms": Study(
        [
            case(setup, arm, lr=factor * setup.lr, scored=True)
            for setup, factor in product(SETUPS, (1, 2))
            for arm in (DEFAULT, WARMUP, GRADINIT)
        ],
        seeds=(1, 2, 3),
        picture=shown.loss_curves,
    ),
    "short": Study(
        [
            case(setup, replace(arm, title=title), lr=2 * setup.lr, warmup=updates)
            for setup, updates in product(SETUPS, (50, 100))
            for arm, title in (
                (DEFAULT, "default, short warmup"),
                (GRADINIT, "GradInit, short warmup"),
            )
        ],
        seeds=(1, 2, 3),
        tables=partial(shown.grid_tables, grid=STARTS),
    ),
    "stability": Study(
        [
            case(SHORT, arm, lr=lr, optimizer=adam(beta2))
            for arm in (DEFAULT, GRADINIT)
            for beta2 in (0.9, 0.95, 0.98, 0.999)
            for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
        ],
        tables=partial(shown.share_tables, grid=BETAS),
        picture=lambda runs: draw(shown.panels(runs, BETAS)),
    ),
    "sgd": Study(
        [
            case(MULTI30K, arm, lr=lr, optimizer=SGD)
            for lr in (0.0625, 0.125, 0.25, 0.5)
            for arm in (DEFAULT, WARMUP, GRADINIT)
        ],
        picture=shown.rate_curves,
    ),
    "variants": Study([case(MULTI30K, NOT_LEARNED)], seeds=(1, 2)),
    "transfer": Study(
        [
            case(MULTI30K, more(f"scales of {name}"), scales_of=case(setup, GRADINIT))
            for name, setup in SCALES_OF.items()
        ],
        seeds=(2, 3),
        picture=shown.loss_curves,
    ),
    "iterations": Study(
        [
            case(setup, more(f"{updates} iterations", "--gradinit-iterations", f"{updates}"))
            for setup in SETUPS
            for updates in (15, 30, 200, 780)
        ],
        seeds=(1, 2, 3),
        picture=shown.loss_curves,
    ),
    "sizes": Study([case(DEEP, arm) for arm in (WARMUP, GRADINIT, DEFAULT)]),
}


# ---- The program.


def kept_runs(study: Study, file: Path, corpora: Mapping[str, Corpus]) -> list[RunRecord]:
    """The runs to show: those of a study, of any seed, on its corpora as they are now.

    A corpus that is not given is as it was in its last run.
    """
    runs = read_runs([file]) if file.exists() else []
    titles = {(case.recipe, case.settings): case.title for case in study.cases}
    digests = {shown.study_corpus(run): run.corpus_digest for run in runs}
    digests |= {name: corpus.digest for name, corpus in corpora.items()}
    found = [
        replace(run, title=titles[kind])
        for run in runs
        if (kind := (run.recipe, run.settings)) in titles
        and run.corpus_digest == digests[shown.study_corpus(run)]
    ]
    order = list(titles)
    return sorted(found, key=lambda run: (order.index((run.recipe, run.settings)), run.seed))


def run_missing(study: Study, file: Path, corpora: Mapping[str, Corpus]) -> None:
    """Carry out what is not kept, and keep the record of each run as soon as it has ended.

    Raises:
        RunError: a run failed.
    """

    def placed(case: Case) -> Case:
        other = placed(case.scales_of) if case.scales_of else None
        return replace(case, corpus=str(corpora[case.corpus].folder), scales_of=other)

    done = {(run.recipe, run.settings, run.seed) for run in kept_runs(study, file, corpora)}
    for case in study.runs:
        needed = {each.corpus for each in (case, case.scales_of) if each}
        if not needed <= corpora.keys() or (case.recipe, case.settings, case.seed) in done:
            continue
        digest = sha256(repr(case).encode()).hexdigest()
        run = Run(placed(case), WORK / digest[:16], threads=1)
        record = run.carry_out()
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        append_run(file, record)
        print(f"{case.label}: {summary(record)}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--table", action="store_true", help="show what is kept, and run nothing")
    options = parser.parse_args(arguments)
    given = (pair.partition("=")[::2] for pair in options.corpus)
    corpora = {name: Corpus.read(Path(folder).resolve()) for name, folder in given}
    study, file = STUDIES[options.study], RESULTS / f"training-{options.study}.jsonl"
    if not options.table:
        run_missing(study, file, corpora)
    if runs := kept_runs(study, file, corpora):
        what = f"{count(runs)} of one thread each"
        command = f"python benchmarks/training.py {options.study}"
        line = source(command, what, [run.circumstances for run in runs])
        print("\n".join(markdown_table(table, line) for table in study.tables(runs)), end="")
        if study.picture:
            study.picture(runs).savefig(file.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
