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
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
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
    interleaved_seconds,
    iteration,
    peak_memory,
    seconds_for,
    training_step,
)

from fairseq_gradinit.engine import GradInitConfig, ProcessGroup

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


def contenders_for(workload: Workload) -> dict[str, Contender]:
    violated = ALWAYS_VIOLATED
    return {
        STEP: partial(training_step, workload),
        OBJECTIVE: partial(iteration, workload, workload.config()),
        DIFFERENCES: partial(iteration, workload, workload.config(violated, "finite-difference")),
        EXACT: partial(iteration, workload, workload.config(violated, "exact")),
        PLAIN_OBJECTIVE: partial(iteration, workload, workload.config(), plain=True),
        PLAIN_CONSTRAINT: partial(iteration, workload, workload.config(violated), plain=True),
    }


def judged(value: float, *, most: float = math.inf, least: float = -math.inf) -> str:
    """`value` with the verdict on it."""
    return f"{value:.2f}" if least <= value <= most else f"{value:.2f}, **missed**"


def describe(workload: Workload) -> str:
    size = workload.size
    return (
        f"{size.layers}+{size.layers} layers, d={size.width}, ffn={size.feed_forward}, "
        f"{size.sentences * size.length} tokens a side, {workload.precision}, {workload.device}"
    )


# ---- The iterations, and whole runs.


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
        tables.append(iteration_table(workload, seconds, memory))
        tables.append(run_table(workload, seconds, memory, *whole_runs(workload, iterations)))
    return tables


def whole_runs(workload: Workload, iterations: int) -> tuple[dict[str, float], dict[str, str]]:
    """Times and kinds of iterations of runs that take turns, so that all see the same machine."""
    with workload.learner(workload.config()) as learner:
        learner.step(workload.pair())
        learner.flush()
        gamma = GAMMA_SHARE * learner.outcomes.history[0].grad_norm
    lr = GradInitConfig.lr
    with ExitStack() as stack:
        plain = stack.enter_context(workload.plain_learner(workload.config(gamma, lr=lr)))
        ours = {
            name: stack.enter_context(workload.learner(workload.config(gamma, way, lr)))
            for name, way in ((DIFFERENCES, "finite-difference"), (EXACT, "exact"))
        }
        learners = {"plain": plain, **ours}
        seconds = dict.fromkeys(learners, 0.0)
        for pair in map(workload.pair, range(iterations)):
            for name, learner in learners.items():
                seconds[name] += seconds_for(partial(learner.step, pair), workload.device)
        for learner in ours.values():
            learner.flush()
    kinds = {name: [i.kind for i in learner.outcomes.history] for name, learner in ours.items()}
    mixes = {
        name: f"{found.count('objective')} objective and {found.count('constraint')} constraint "
        "iterations"
        for name, found in {"plain": plain.kinds, **kinds}.items()
    }
    return seconds, mixes


def iteration_table(
    workload: Workload, seconds: Mapping[str, Seconds], memory: Mapping[str, int]
) -> Table:
    """Time and memory of every contender, absolute and in training steps."""
    rows = []
    for name, time in seconds.items():
        spread = f"{1e3 * time.lowest:.4g} to {1e3 * time.highest:.4g}"
        row = [name, f"{1e3 * time.median:.4g} ({spread})"]
        for value, step, targets, more in (
            (time.median, seconds[STEP].median, TIME_TARGETS, [f"{memory[name] / 2**20:.4g}"]),
            (memory[name], memory[STEP], MEMORY_TARGETS, []),
        ):
            limit = f"at most {targets[name]}" if name in targets else ""
            row += [judged(value / step, most=targets.get(name, math.inf)), limit, *more]
        rows.append(row)
    header = ["", "ms (lowest to highest)", "of a step", "target", "peak MiB", "of training"]
    return Table(f"Iterations, {describe(workload)}", [*header, "target"], rows)


def run_table(
    workload: Workload,
    iterations: Mapping[str, Seconds],
    memory: Mapping[str, int],
    runs: Mapping[str, float],
    mixes: Mapping[str, str],
) -> Table:
    """Whole runs against the plain form."""
    exact = f"{runs['plain'] / runs[EXACT]:.2f}"
    differences = judged(runs["plain"] / runs[DIFFERENCES], least=SPEEDUP_TARGET)
    objective = iterations[PLAIN_OBJECTIVE].median / iterations[OBJECTIVE].median
    constraint = iterations[PLAIN_CONSTRAINT].median / iterations[DIFFERENCES].median
    share = max(memory[OBJECTIVE], memory[DIFFERENCES])
    share /= max(memory[PLAIN_OBJECTIVE], memory[PLAIN_CONSTRAINT])
    speedup = f"at least {SPEEDUP_TARGET}"
    rows = [
        [f"faster with finite differences ({mixes[DIFFERENCES]}), times", differences, speedup],
        [f"faster with double backward ({mixes[EXACT]}), times", exact, ""],
        ["the same, all iterations objective, times", f"{objective:.2f}", ""],
        ["the same, all iterations constraint, times", f"{constraint:.2f}", ""],
        [
            "memory with finite differences, of plain",
            judged(share, most=MEMORY_TARGET),
            f"at most {MEMORY_TARGET}",
        ],
    ]
    title = f"Whole runs against the plain form ({mixes['plain']}), {describe(workload)}"
    return Table(title, ["", "measured", "target"], rows)


# ---- Growth: all contenders should grow as a training step does.


@dataclass(frozen=True)
class Axis:
    """One way to grow; `positions` of the sizes are where growth should be linear along."""

    name: str
    unit: str
    positions: Sequence[float]
    sizes: Sequence[Size]


def axes_for(device: str, quick: bool) -> list[Axis]:
    base = Size(3, 128, 512, 4, vocabulary=2000, sentences=8, length=32)
    depths, widths, batches = (3, 6, 12, 24), (128, 256, 384, 512), (4, 8, 16, 32)
    if quick:
        base, depths, widths, batches = TINY, (1, 2, 3), (16, 32), (4, 6)
    elif device == "cuda":
        base = Size(6, 512, 2048, 8, vocabulary=10_000, sentences=64, length=32)
        widths, batches = (256, 512, 768, 1024), (32, 64, 128, 256)
    ratio = base.feed_forward // base.width
    deeper = [replace(base, layers=layers) for layers in depths]
    wider = [replace(base, width=width, feed_forward=ratio * width) for width in widths]
    larger = [replace(base, sentences=sentences) for sentences in batches]
    # As matrix products grow, when the width changes.
    parameters = [sum(p.numel() for p in Workload(size).model().parameters()) for size in wider]
    return [
        Axis("depth", "layers", [2.0 * layers for layers in depths], deeper),
        Axis("width", "million parameters", [count / 1e6 for count in parameters], wider),
        Axis("batch", "sentences", [float(sentences) for sentences in batches], larger),
    ]


Quantities = Mapping[tuple[Size, str], float]


def measure_growth(axes: Sequence[Axis], device: str, quick: bool) -> tuple[Quantities, Quantities]:
    """Median seconds and bytes of every size and contender."""
    schedule = Schedule(3, 7, calls=5) if device == "cuda" else Schedule(1, 2 if quick else 7)
    # The axes have a size in common.
    sizes = dict.fromkeys(size for axis in axes for size in axis.sizes)
    contenders = {
        (size, name): contenders_for(Workload(size, device))[name]
        for size in sizes
        for name in GROWING
    }
    memory = {key: peak_memory(new, device) for key, new in contenders.items()}
    seconds = interleaved_seconds(contenders, schedule, device)
    return {key: found.median for key, found in seconds.items()}, memory


def straight(positions: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """The values on the least-squares line."""
    return np.polyval(np.polyfit(positions, values, 1), positions)


def departure(positions: Sequence[float], values: Sequence[float]) -> float:
    """The largest distance from the least-squares line, as a share of the largest value."""
    return float(np.abs(straight(positions, values) - values).max() / max(values))


def growth_table(axes: Sequence[Axis], *quantities: Quantities) -> Table:
    rows = []
    for axis in axes:
        at = axis.positions
        for name in GROWING:
            row = [f"{axis.name}, {at[0]:.3g} to {at[-1]:.3g} {axis.unit}", name]
            for of in quantities:
                values = [of[size, name] for size in axis.sizes]
                ratios = [of[size, name] / of[size, STEP] for size in axis.sizes]
                row += [f"{departure(at, values):.1%}", ", ".join(f"{r:.2f}" for r in ratios)]
            rows.append(row)
    header = ["", "", "time off a line", "of a step", "memory off a line", "of training"]
    return Table("Growth with depth, width and batch", header, rows)


def save_picture(path: Path, axes: Sequence[Axis], *quantities: Quantities) -> None:
    """Time above, memory below, one column for each axis; dashed are the least-squares lines."""
    figure = Figure(figsize=(12, 6))
    panels = figure.subplots(2, 3)
    for axis, column in zip(axes, panels.T, strict=True):
        for panel, of, unit in zip(column, quantities, (1e-3, 2**20), strict=True):
            for name in GROWING:
                values = [of[size, name] / unit for size in axis.sizes]
                fit = straight(axis.positions, values)
                (dashed,) = panel.plot(axis.positions, fit, "--", linewidth=0.8)
                panel.plot(axis.positions, values, "o", color=dashed.get_color(), label=name)
            panel.set_xlim(left=0)
            panel.set_ylim(bottom=0)
        column[0].set_title(axis.name)
        column[1].set_xlabel(axis.unit)
    panels[0, 0].set_ylabel("ms")
    panels[1, 0].set_ylabel("peak MiB")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="lower center", ncol=len(GROWING))
    figure.tight_layout(rect=(0.0, 0.05, 1.0, 1.0))
    figure.savefig(path, dpi=100)


# ---- Two processes, with a core each; a process always has as many sentences.


def worker(rank: int, folder: str, workload: Workload, schedule: Schedule) -> None:
    """Rank 0 writes its median seconds of an iteration, for both kinds of iterations:

    - while the other process waits;
    - while it does the same for itself: what that loses, the machine loses and not GradInit;
    - of one GradInit that the processes share, which sum their gradients over gloo.
    """
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    pair = workload.pair(seed=rank)
    found = []
    for config in (workload.config(), workload.config(ALWAYS_VIOLATED, "finite-difference")):
        with workload.learner(config) as own, workload.learner(config, ProcessGroup()) as shared:
            steps = [partial(learner.step, pair) for learner in (own, own, shared)]
            if rank != 0:
                steps[0] = list
            times: list[list[float]] = [[], [], []]
            for _ in range(schedule.warmup + schedule.repetitions):
                for step, taken in zip(steps, times, strict=True):
                    torch.distributed.barrier()
                    taken.append(seconds_for(step, workload.device, schedule.calls))
            found.append([median(taken[schedule.warmup :]) for taken in times])
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def measure_processes(quick: bool) -> Table:
    size, schedule = (TINY, Schedule(1, 2)) if quick else (SMALL, Schedule(1, 9))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, Workload(size), schedule)
        multiprocessing.start_processes(worker, arguments, PROCESSES, start_method="fork")
        found = json.loads(Path(folder, "times.json").read_text(encoding="utf-8"))
    rows = [
        [
            *(kind, f"{1e3 * alone:.4g}", f"{1e3 * together:.4g}"),
            *(judged(alone / together, least=EFFICIENCY_TARGET), f"at least {EFFICIENCY_TARGET}"),
            f"{alone / unconnected:.2f}",
        ]
        for kind, (alone, unconnected, together) in zip(
            ("objective", DIFFERENCES), found, strict=True
        )
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
            axes = axes_for(options.device, options.quick)
            measured = measure_growth(axes, options.device, options.quick)
            tables = [growth_table(axes, *measured)]
            path.parent.mkdir(parents=True, exist_ok=True)
            save_picture(path.with_suffix(".png"), axes, *measured)
        write(path, {"tables": [*map(asdict, tables)]})
    print(kept_tables(options.results), end="")


if __name__ == "__main__":
    main()
