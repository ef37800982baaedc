"""What GradInit costs, in training steps: forward, backward and Adam on one batch.

    python benchmarks/cost.py                   the iterations, and whole runs beside the plain form
                                                of the algorithm (plain_gradinit.py)
    python benchmarks/cost.py scaling           their growth with depth, width and batch
    python benchmarks/cost.py processes         two processes against one
    python benchmarks/cost.py --device cuda     on a GPU, at the sizes of IWSLT and twice as wide
    python benchmarks/cost.py --table           Markdown of all results that are kept

Each takes one to three minutes on one CPU core, the processes on two.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from matplotlib.figure import Figure
from record import RESULTS, Table, markdown, read, write
from torch import multiprocessing
from workload import (
    ALWAYS_VIOLATED,
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

from fairseq_gradinit.engine import GradInitConfig, ProcessGroup
from fairseq_gradinit.engine.history import IterationKind

PARTS = ("cost", "scaling", "processes")
TINY = Size(1, 16, 32, 2, vocabulary=50, sentences=4, length=6)
SMALL = Size(6, 256, 1024, 4, vocabulary=4000, sentences=16, length=32)

STEP, OBJECTIVE = "training step", "objective iteration"
DIFFERENCES, EXACT = "constraint, finite differences", "constraint, double backward"
PLAIN_OBJECTIVE, PLAIN_CONSTRAINT = "plain objective iteration", "plain constraint iteration"
GROWING = (STEP, OBJECTIVE, DIFFERENCES, EXACT)

TIME_TARGETS = {OBJECTIVE: 2.2, DIFFERENCES: 2.3, EXACT: 3.5}
MEMORY_TARGETS = {OBJECTIVE: 1.1, DIFFERENCES: 1.1, EXACT: 2.2}
SPEEDUP_TARGET, MEMORY_TARGET, EFFICIENCY_TARGET = 1.8, 0.6, 0.85

GAMMA_SHARE = 0.8
"""gamma of the whole runs as a share of the norm at the start: both kinds of iterations occur."""

PROCESSES = 2


@dataclass(frozen=True)
class Cost:
    seconds: Seconds
    bytes: int


def contenders_for(workload: Workload) -> dict[str, Contender]:
    return {
        STEP: training(workload),
        OBJECTIVE: objective(workload),
        DIFFERENCES: constraint(workload, "finite-difference"),
        EXACT: constraint(workload, "exact"),
        PLAIN_OBJECTIVE: plain_objective(workload),
        PLAIN_CONSTRAINT: plain_constraint(workload),
    }


def within(value: float, limit: float | None) -> str:
    """`value` with the verdict on it, for a target of at most `limit`."""
    return f"{value:.2f}" if limit is None or value <= limit else f"{value:.2f}, **missed**"


def reaching(value: float, limit: float) -> str:
    """`value` with the verdict on it, for a target of at least `limit`."""
    return f"{value:.2f}" if value >= limit else f"{value:.2f}, **missed**"


def describe(workload: Workload) -> str:
    size = workload.size
    return (
        f"{size.layers}+{size.layers} layers, d={size.width}, ffn={size.feed_forward}, "
        f"{size.sentences * size.length} tokens a side, {workload.precision}, {workload.device}"
    )


# ---- The iterations, and whole runs.


@dataclass(frozen=True)
class Run:
    """A whole run: its time, and the kinds of its iterations."""

    seconds: float
    kinds: Sequence[IterationKind]

    @property
    def mix(self) -> str:
        objective, constraint = (self.kinds.count(kind) for kind in ("objective", "constraint"))
        return f"{objective} objective and {constraint} constraint iterations"


def measure_iterations(device: str, quick: bool) -> list[Table]:
    workloads, schedule, iterations = [Workload(SMALL)], Schedule(1, 9), 24
    if quick:
        workloads, schedule, iterations = [Workload(TINY, device)], Schedule(1, 2), 6
    elif device == "cuda":
        iwslt = Size(6, 512, 1024, 4, vocabulary=10_000, sentences=128, length=32)
        sizes = (iwslt, replace(iwslt, width=1024, feed_forward=4096, heads=16))
        workloads = [Workload(size, device, how) for size in sizes for how in ("fp32", "bf16")]
        schedule, iterations = Schedule(3, 5, calls=5), 40
    tables = []
    for workload in workloads:
        contenders = contenders_for(workload)
        memory = {name: peak_memory(new, device) for name, new in contenders.items()}
        seconds = interleaved_seconds(contenders, schedule, device)
        costs = {name: Cost(seconds[name], memory[name]) for name in contenders}
        tables += [iteration_table(workload, costs)]
        tables += [run_table(workload, costs, whole_runs(workload, iterations))]
    return tables


def whole_runs(workload: Workload, iterations: int) -> dict[str, Run]:
    """Runs that take their iterations in turn, so that all see the same machine."""
    with learner_of(workload, settings(workload)) as learner:
        learner.step(workload.pair())
        learner.flush()
        gamma = GAMMA_SHARE * learner.history[0].grad_norm
    lr = GradInitConfig.lr
    ways = {"finite differences": "finite-difference", "double backward": "exact"}
    with ExitStack() as stack:
        ours = {
            name: stack.enter_context(learner_of(workload, settings(workload, gamma, way, lr)))
            for name, way in ways.items()
        }
        plain = stack.enter_context(plain_learner_of(workload, settings(workload, gamma, lr=lr)))
        learners = {"plain": plain, **ours}
        seconds = dict.fromkeys(learners, 0.0)
        for pair in map(workload.pair, range(iterations)):
            for name, learner in learners.items():
                seconds[name] += seconds_for(
                    lambda do=learner.step, pair=pair: do(pair), workload.device
                )
        for learner in ours.values():
            learner.flush()
        kinds = {name: [i.kind for i in learner.history] for name, learner in ours.items()}
        kinds["plain"] = plain.kinds
        return {name: Run(seconds[name], kinds[name]) for name in learners}


def iteration_table(workload: Workload, costs: dict[str, Cost]) -> Table:
    """Time and memory of every contender, absolute and in training steps."""
    step = costs[STEP]
    rows = []
    for name, cost in costs.items():
        spread = f"{1e3 * cost.seconds.lowest:.4g} to {1e3 * cost.seconds.highest:.4g}"
        time, memory = TIME_TARGETS.get(name), MEMORY_TARGETS.get(name)
        rows.append(
            [
                name,
                f"{1e3 * cost.seconds.median:.4g} ({spread})",
                within(cost.seconds.median / step.seconds.median, time),
                "" if time is None else f"at most {time}",
                f"{cost.bytes / 2**20:.4g}",
                within(cost.bytes / step.bytes, memory),
                "" if memory is None else f"at most {memory}",
            ]
        )
    header = ["", "ms (lowest to highest)", "of a step", "target", "peak MiB", "of training"]
    return Table(f"Iterations, {describe(workload)}", [*header, "target"], rows)


def run_table(workload: Workload, costs: dict[str, Cost], runs: dict[str, Run]) -> Table:
    """Whole runs against the plain form."""
    plain, differences, exact = (
        runs[name] for name in ("plain", "finite differences", "double backward")
    )
    seconds = {name: cost.seconds.median for name, cost in costs.items()}
    memory = max(costs[OBJECTIVE].bytes, costs[DIFFERENCES].bytes)
    memory /= max(costs[PLAIN_OBJECTIVE].bytes, costs[PLAIN_CONSTRAINT].bytes)
    rows = [
        [
            f"faster with finite differences ({differences.mix}), times",
            reaching(plain.seconds / differences.seconds, SPEEDUP_TARGET),
            f"at least {SPEEDUP_TARGET}",
        ],
        [
            f"faster with double backward ({exact.mix}), times",
            f"{plain.seconds / exact.seconds:.2f}",
            "",
        ],
        [
            "the same, all iterations objective, times",
            f"{seconds[PLAIN_OBJECTIVE] / seconds[OBJECTIVE]:.2f}",
            "",
        ],
        [
            "the same, all iterations constraint, times",
            f"{seconds[PLAIN_CONSTRAINT] / seconds[DIFFERENCES]:.2f}",
            "",
        ],
        [
            "memory with finite differences, of plain",
            within(memory, MEMORY_TARGET),
            f"at most {MEMORY_TARGET}",
        ],
    ]
    title = f"Whole runs against the plain form ({plain.mix}), {describe(workload)}"
    return Table(title, ["", "measured", "target"], rows)


# ---- Growth: all contenders should grow as a training step does.


@dataclass(frozen=True)
class Axis:
    """One way to grow.

    Attributes:
        unit: of `position`.
        position: of a size on the axis that growth should be linear along.
    """

    name: str
    unit: str
    position: Callable[[Size], float]
    sizes: Sequence[Size]


@dataclass(frozen=True)
class Line:
    """What one contender takes along one axis.

    Attributes:
        positions: on the axis, one for each size.
        seconds: median times.
    """

    axis: Axis
    contender: str
    positions: Sequence[float]
    seconds: Sequence[float]
    bytes: Sequence[int]


def axes_for(device: str, quick: bool) -> list[Axis]:
    base = Size(3, 128, 512, 4, vocabulary=2000, sentences=8, length=32)
    depths, widths, batches = (3, 6, 12, 24), (128, 256, 384, 512), (4, 8, 16, 32)
    if quick:
        base, depths, widths, batches = TINY, (1, 2, 3), (16, 32), (4, 6)
    elif device == "cuda":
        base = Size(6, 512, 2048, 8, vocabulary=10_000, sentences=64, length=32)
        widths, batches = (256, 512, 768, 1024), (32, 64, 128, 256)
    ratio = base.feed_forward // base.width
    wider = [replace(base, width=width, feed_forward=ratio * width) for width in widths]
    deeper = [replace(base, layers=layers) for layers in depths]
    larger = [replace(base, sentences=sentences) for sentences in batches]
    return [
        Axis("depth", "layers", lambda size: 2.0 * size.layers, deeper),
        # As matrix products grow, when the width changes.
        Axis("width", "million parameters", parameters_of, wider),
        Axis("batch", "sentences", lambda size: float(size.sentences), larger),
    ]


def parameters_of(size: Size) -> float:
    return sum(p.numel() for p in Workload(size).model().parameters()) / 1e6


def measure_growth(device: str, quick: bool) -> list[Line]:
    schedule = Schedule(3, 7, calls=5) if device == "cuda" else Schedule(1, 7)
    if quick:
        schedule = Schedule(1, 2)
    axes = axes_for(device, quick)
    # The axes have a size in common.
    sizes = dict.fromkeys(size for axis in axes for size in axis.sizes)
    contenders = {
        (size, name): new
        for size in sizes
        for name, new in contenders_for(Workload(size, device)).items()
        if name in GROWING
    }
    memory = {key: peak_memory(new, device) for key, new in contenders.items()}
    seconds = interleaved_seconds(contenders, schedule, device)
    return [
        Line(
            *(axis, name, [axis.position(size) for size in axis.sizes]),
            seconds=[seconds[size, name].median for size in axis.sizes],
            bytes=[memory[size, name] for size in axis.sizes],
        )
        for axis in axes
        for name in GROWING
    ]


def straight(positions: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """The values on the least-squares line."""
    return np.polyval(np.polyfit(positions, values, 1), positions)


def departure(positions: Sequence[float], values: Sequence[float]) -> float:
    """The largest distance from the least-squares line, as a share of the largest value."""
    return float(np.abs(straight(positions, values) - values).max() / max(values))


def growth_table(lines: Sequence[Line]) -> Table:
    rows = []
    steps = {line.axis.name: line for line in lines if line.contender == STEP}
    for line in lines:
        axis, step, at = line.axis, steps[line.axis.name], line.positions
        rows.append(
            [
                f"{axis.name}, {at[0]:.3g} to {at[-1]:.3g} {axis.unit}",
                line.contender,
                f"{departure(at, line.seconds):.1%}",
                _ratios(line.seconds, step.seconds),
                f"{departure(at, line.bytes):.1%}",
                _ratios(line.bytes, step.bytes),
            ]
        )
    header = ["", "", "time off a line", "of a step", "memory off a line", "of training"]
    return Table("Growth with depth, width and batch", header, rows)


def _ratios(values: Sequence[float], steps: Sequence[float]) -> str:
    return ", ".join(f"{value / step:.2f}" for value, step in zip(values, steps, strict=True))


def save_picture(lines: Sequence[Line], path: Path) -> None:
    """Time above, memory below, one column for each axis; dashed are the least-squares lines."""
    figure = Figure(figsize=(12, 6))
    panels = figure.subplots(2, 3)
    columns = {
        line.axis.name: column
        for line, column in zip(lines[:: len(GROWING)], panels.T, strict=True)
    }
    for line in lines:
        values = (1e3 * np.array(line.seconds), np.array(line.bytes) / 2**20)
        for panel, quantity in zip(columns[line.axis.name], values, strict=True):
            fit = straight(line.positions, quantity)
            (dashed,) = panel.plot(line.positions, fit, "--", linewidth=0.8)
            colour = dashed.get_color()
            panel.plot(line.positions, quantity, "o", color=colour, label=line.contender)
            panel.set_xlim(left=0)
            panel.set_ylim(bottom=0)
        columns[line.axis.name][0].set_title(line.axis.name)
        columns[line.axis.name][1].set_xlabel(line.axis.unit)
    panels[0, 0].set_ylabel("ms")
    panels[1, 0].set_ylabel("peak MiB")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="lower center", ncol=len(GROWING))
    figure.tight_layout(rect=(0.0, 0.05, 1.0, 1.0))
    figure.savefig(path, dpi=100)


# ---- Two processes, with a core each.


@dataclass(frozen=True)
class Times:
    """Median seconds of one iteration of rank 0; a process always has as many sentences.

    Attributes:
        alone: while the other process waits.
        unconnected: while the other process does the same for itself. What that loses, the machine
            loses and not GradInit.
        together: of one GradInit that the processes share, which sum their gradients over gloo.
    """

    kind: str
    alone: float
    unconnected: float
    together: float


def times_of(kind: str, workload: Workload, config: GradInitConfig, schedule: Schedule) -> Times:
    """Called by every process; what rank 0 returns counts."""
    rank = torch.distributed.get_rank()
    pair = workload.pair(seed=rank)
    times: dict[str, list[float]] = {"alone": [], "unconnected": [], "together": []}
    with (
        learner_of(workload, config) as own,
        learner_of(workload, config, ProcessGroup()) as shared,
    ):

        def take(name: str, step: Callable[[], None]) -> None:
            torch.distributed.barrier()
            times[name].append(seconds_for(step, workload.device, schedule.calls))

        for _ in range(schedule.warmup + schedule.repetitions):
            if rank == 0:
                take("alone", lambda: own.step(pair))
            else:
                torch.distributed.barrier()
            take("unconnected", lambda: own.step(pair))
            take("together", lambda: shared.step(pair))
    medians = {name: median(t[schedule.warmup :]) for name, t in times.items() if t}
    return Times(kind, medians.get("alone", 0.0), medians["unconnected"], medians["together"])


def worker(rank: int, folder: str, workload: Workload, schedule: Schedule) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    configs = {
        "objective": settings(workload),
        DIFFERENCES: settings(workload, ALWAYS_VIOLATED, "finite-difference"),
    }
    found = [times_of(kind, workload, config, schedule) for kind, config in configs.items()]
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps([*map(asdict, found)]), encoding="utf-8")
    torch.distributed.destroy_process_group()


def measure_processes(quick: bool) -> Table:
    size, schedule = (TINY, Schedule(1, 2)) if quick else (SMALL, Schedule(1, 9))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, Workload(size), schedule)
        multiprocessing.start_processes(worker, arguments, PROCESSES, start_method="fork")
        found = json.loads(Path(folder, "times.json").read_text(encoding="utf-8"))
    rows = [
        [
            times.kind,
            f"{1e3 * times.alone:.4g}",
            f"{1e3 * times.together:.4g}",
            reaching(times.alone / times.together, EFFICIENCY_TARGET),
            f"at least {EFFICIENCY_TARGET}",
            f"{times.alone / times.unconnected:.2f}",
        ]
        for times in (Times(**row) for row in found)
    ]
    title = (
        f"Two processes against one, {size.layers}+{size.layers} layers, d={size.width}, "
        f"{size.sentences * size.length} tokens a side in each process"
    )
    header = ["", "one, ms", "two, ms", "efficiency", "target", "two that share nothing"]
    return Table(title, header, rows)


# ---- The program.


def kept_tables(folder: Path) -> str:
    """Markdown of all results in `folder`."""
    paths = [folder / f"{part}-{device}.json" for part in PARTS for device in ("cpu", "cuda")]
    records = [read(path) for path in paths if path.exists()]
    return "\n".join(
        markdown(record, (Table(**table) for table in record["results"]["tables"]))
        for record in records
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", default="cost", choices=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--table", action="store_true", help="print what is kept, measure nothing")
    options = parser.parse_args(arguments)
    if not options.table:
        torch.set_num_threads(1)
        path = options.results / f"{options.part}-{options.device}.json"
        if options.part == "cost":
            tables = measure_iterations(options.device, options.quick)
        elif options.part == "processes":
            tables = [measure_processes(options.quick)]
        else:
            lines = measure_growth(options.device, options.quick)
            tables = [growth_table(lines)]
            save_picture(lines, path.with_suffix(".png"))
        write(path, {"tables": [*map(asdict, tables)]})
    print(kept_tables(options.results), end="")


if __name__ == "__main__":
    main()
