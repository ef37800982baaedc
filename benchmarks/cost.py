"""What GradInit costs: time and peak memory of its iterations in training steps.

    python benchmarks/cost.py                   on one CPU core, about 3 minutes
    python benchmarks/cost.py --device cuda     on a GPU, at the sizes of IWSLT and twice as wide
    python benchmarks/cost.py --table           Markdown of all kept results, also of scaling.py,
                                                processes_efficiency.py and accuracy.py

One training step is forward, backward and Adam on one batch. The baseline is the plain form of the
algorithm, see `plain_gradinit.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from record import RESULTS, Table, markdown, reaching, read, within, write
from workload import (
    Contender,
    Schedule,
    Seconds,
    Size,
    Workload,
    constraint,
    interleaved_seconds,
    learner_of,
    objective,
    peak_memory,
    plain_constraint,
    plain_learner_of,
    plain_objective,
    seconds_for,
    settings,
    training,
)

from fairseq_gradinit.config import GradInitConfig
from fairseq_gradinit.history import Iteration, IterationKind

RESULT_FILES = (
    *("cost-cpu", "scaling-cpu", "processes-cpu", "cost-cuda", "scaling-cuda", "accuracy-cpu"),
)

STEP, OBJECTIVE = "training step", "objective iteration"
DIFFERENCES, EXACT = "constraint, finite differences", "constraint, double backward"
PLAIN_OBJECTIVE, PLAIN_CONSTRAINT = "plain objective iteration", "plain constraint iteration"

TIME_TARGETS = {OBJECTIVE: 2.2, DIFFERENCES: 2.3, EXACT: 3.5}
MEMORY_TARGETS = {OBJECTIVE: 1.1, DIFFERENCES: 1.1, EXACT: 2.2}
SPEEDUP_TARGET, MEMORY_TARGET, SHARE_TARGET = 1.8, 0.6, 0.02

GAMMA_SHARE = 0.8
"""gamma of the whole runs as a share of the norm at the start: both kinds of iterations occur."""

IWSLT_UPDATES, PAPER_ITERATIONS = 100_000, 780


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        iterations: of the whole runs.
        with_share: whether the first workload is that of an IWSLT run.
    """

    workloads: Sequence[Workload]
    schedule: Schedule
    iterations: int
    with_share: bool = False


@dataclass(frozen=True)
class Cost:
    seconds: Seconds
    bytes: int


@dataclass(frozen=True)
class Run:
    """A whole run: its time, and the kinds of its iterations."""

    seconds: float
    kinds: Sequence[IterationKind]


@dataclass(frozen=True)
class Runs:
    """Whole runs on the same batches with the same settings."""

    gamma: float
    plain: Run
    differences: Run
    exact: Run


@dataclass(frozen=True)
class Costs:
    workload: Workload
    by_contender: dict[str, Cost]
    runs: Runs


def plan_for(device: str, quick: bool) -> Plan:
    if quick:
        tiny = Size(1, 16, 32, 2, vocabulary=50, sentences=4, length=6)
        return Plan([Workload(tiny, device)], Schedule(1, 2), iterations=6, with_share=True)
    if device == "cpu":
        small = Size(6, 256, 1024, 4, vocabulary=4000, sentences=16, length=32)
        return Plan([Workload(small)], Schedule(1, 9), iterations=24)
    iwslt = Size(6, 512, 1024, 4, vocabulary=10_000, sentences=128, length=32)
    wide = Size(6, 1024, 4096, 16, vocabulary=10_000, sentences=128, length=32)
    workloads = [
        Workload(size, device, precision)
        for size in (iwslt, wide)
        for precision in ("fp32", "bf16")
    ]
    return Plan(workloads, Schedule(3, 5, calls=5), iterations=40, with_share=True)


def contenders_for(workload: Workload) -> dict[str, Contender]:
    return {
        STEP: training(workload),
        OBJECTIVE: objective(workload),
        DIFFERENCES: constraint(workload, "finite-difference"),
        EXACT: constraint(workload, "exact"),
        PLAIN_OBJECTIVE: plain_objective(workload),
        PLAIN_CONSTRAINT: plain_constraint(workload),
    }


def measure(workload: Workload, schedule: Schedule, iterations: int) -> Costs:
    contenders = contenders_for(workload)
    memory = {name: peak_memory(new, workload.device) for name, new in contenders.items()}
    seconds = interleaved_seconds(contenders, schedule, workload.device)
    return Costs(
        workload=workload,
        by_contender={name: Cost(seconds[name], memory[name]) for name in contenders},
        runs=whole_runs(workload, iterations),
    )


def whole_runs(workload: Workload, iterations: int) -> Runs:
    """Three runs that take their iterations in turn, so that all see the same machine."""
    gamma = GAMMA_SHARE * first_iteration(workload).grad_norm
    lr = GradInitConfig.lr
    pairs = [workload.pair(seed) for seed in range(iterations)]
    with ExitStack() as stack:
        differences, exact = (
            stack.enter_context(learner_of(workload, settings(workload, gamma, form, lr)))
            for form in ("finite-difference", "exact")
        )
        plain = stack.enter_context(plain_learner_of(workload, settings(workload, gamma, lr=lr)))
        learners = (plain, differences, exact)
        seconds = [0.0] * len(learners)
        for pair in pairs:
            for i, learner in enumerate(learners):
                seconds[i] += seconds_for(
                    lambda do=learner.step, pair=pair: do(pair), workload.device
                )
        for learner in (differences, exact):
            learner.flush()
        return Runs(
            gamma,
            plain=Run(seconds[0], plain.kinds),
            differences=Run(seconds[1], [i.kind for i in differences.history]),
            exact=Run(seconds[2], [i.kind for i in exact.history]),
        )


def first_iteration(workload: Workload) -> Iteration:
    with learner_of(workload, settings(workload)) as learner:
        learner.step(workload.pair())
        learner.flush()
        return learner.history[0]


def iteration_table(costs: Costs) -> Table:
    """Time and memory of every contender, absolute and in training steps."""
    step = costs.by_contender[STEP]
    rows = []
    for name, cost in costs.by_contender.items():
        time_ratio = cost.seconds.median / step.seconds.median
        memory_ratio = cost.bytes / step.bytes
        spread = f"{1e3 * cost.seconds.lowest:.4g} to {1e3 * cost.seconds.highest:.4g}"
        rows.append(
            [
                name,
                f"{1e3 * cost.seconds.median:.4g} ({spread})",
                within(time_ratio, TIME_TARGETS.get(name, time_ratio)),
                _at_most(TIME_TARGETS.get(name)),
                f"{cost.bytes / 2**20:.4g}",
                within(memory_ratio, MEMORY_TARGETS.get(name, memory_ratio)),
                _at_most(MEMORY_TARGETS.get(name)),
            ]
        )
    header = ["", "ms (lowest to highest)", "of a step", "target", "peak MiB", "of training"]
    return Table(f"Iterations, {describe(costs.workload)}", [*header, "target"], rows)


def run_table(costs: Costs, with_share: bool) -> Table:
    """Whole runs against the plain form; optionally the share of an IWSLT run."""
    runs, plain_mix = costs.runs, _mix(costs.runs.plain)
    rows = [
        _speedup_row("finite differences", runs.differences, runs.plain),
        _speedup_row("double backward", runs.exact, runs.plain),
        ["the same, all iterations objective, times", _plain_speedup(costs, OBJECTIVE), ""],
        ["the same, all iterations constraint, times", _plain_speedup(costs, DIFFERENCES), ""],
        ["memory with finite differences, of plain", *_memory_of_plain(costs)],
    ]
    if with_share:
        rows += _share_rows(costs)
    title = f"Whole runs against the plain form ({plain_mix}), {describe(costs.workload)}"
    return Table(title, ["", "measured", "target"], rows)


def describe(workload: Workload) -> str:
    size = workload.size
    return (
        f"{size.layers}+{size.layers} layers, d={size.width}, ffn={size.feed_forward}, "
        f"{size.sentences * size.length} tokens a side, {workload.precision}, {workload.device}"
    )


def _at_most(limit: float | None) -> str:
    return "" if limit is None else f"at most {limit}"


def _mix(run: Run) -> str:
    objective, constraint = (run.kinds.count(kind) for kind in ("objective", "constraint"))
    return f"{objective} objective and {constraint} constraint iterations"


def _speedup_row(name: str, run: Run, plain: Run) -> list[str]:
    quantity = f"faster with {name} ({_mix(run)}), times"
    target = SPEEDUP_TARGET if name == "finite differences" else None
    speedup = plain.seconds / run.seconds
    measured = f"{speedup:.2f}" if target is None else reaching(speedup, target)
    return [quantity, measured, "" if target is None else f"at least {target}"]


def _plain_speedup(costs: Costs, kind: str) -> str:
    """How many times as long the plain form of one kind of iteration takes."""
    plain = PLAIN_OBJECTIVE if kind == OBJECTIVE else PLAIN_CONSTRAINT
    seconds = {name: cost.seconds.median for name, cost in costs.by_contender.items()}
    return f"{seconds[plain] / seconds[kind]:.2f}"


def _memory_of_plain(costs: Costs) -> tuple[str, str]:
    peak = {name: cost.bytes for name, cost in costs.by_contender.items()}
    ours = max(peak[OBJECTIVE], peak[DIFFERENCES])
    ratio = ours / max(peak[PLAIN_OBJECTIVE], peak[PLAIN_CONSTRAINT])
    return within(ratio, MEMORY_TARGET), f"at most {MEMORY_TARGET}"


def _share_rows(costs: Costs) -> list[list[str]]:
    """The share of a training of 100k updates that GradInit takes, as we and as the authors do."""
    cases = [(OBJECTIVE, GradInitConfig.iterations), (DIFFERENCES, PAPER_ITERATIONS)]
    rows = []
    for kind, iterations in cases:
        gradinit = iterations * costs.by_contender[kind].seconds.median
        run = gradinit + IWSLT_UPDATES * costs.by_contender[STEP].seconds.median
        percent = 100 * gradinit / run
        verdict = "" if gradinit / run < SHARE_TARGET else ", **missed**"
        quantity = f"share of {IWSLT_UPDATES // 1000}k updates: {iterations} x {kind}"
        rows.append([quantity, f"{percent:.2f} %{verdict}", f"under {SHARE_TARGET:.0%}"])
    return rows


def kept_tables(folder: Path) -> str:
    """Markdown of all results in `folder`."""
    paths = [folder / f"{name}.json" for name in RESULT_FILES]
    return "\n".join(markdown(read(path)) for path in paths if path.exists())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = usual_parser(__doc__)
    add_device_options(parser)
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="of a size's title: d=512, bf16"
    )
    parser.add_argument("--table", action="store_true", help="print what is kept, measure nothing")
    options = parser.parse_args(arguments)
    if options.table:
        print(kept_tables(options.results), end="")
        return
    torch.set_num_threads(options.threads)
    plan = plan_for(options.device, options.quick)
    workloads = [w for w in plan.workloads if options.only in describe(w)]
    if not workloads:
        parser.error(
            f"--only {options.only}: the sizes are {'; '.join(map(describe, plan.workloads))}"
        )
    all_costs = [measure(w, plan.schedule, plan.iterations) for w in workloads]
    tables = []
    for costs in all_costs:
        with_share = plan.with_share and costs.workload == plan.workloads[0]
        tables += [iteration_table(costs), run_table(costs, with_share)]
    path = options.results / f"cost-{options.device}.json"
    results = {"tables": [*map(asdict, tables)], "costs": [*map(asdict, all_costs)]}
    write(path, results)
    print(markdown(read(path)), end="")


def usual_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark of the cost."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    return parser


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")


if __name__ == "__main__":
    main()
