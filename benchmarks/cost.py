"""What GradInit costs, in training steps: forward, backward and Adam on one batch.

    python benchmarks/cost.py                   the iterations, and whole runs beside the plain form
                                                of the algorithm (plain_gradinit.py)
    python benchmarks/cost.py scaling           their growth with depth, width and batch
    python benchmarks/cost.py processes         two processes against one
    python benchmarks/cost.py gpu               time and memory on a GPU, in fp32 and bf16
    python benchmarks/cost.py --table           Markdown of all results that are kept

Each takes one to three minutes on one CPU core, the processes on two.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import workload
from matplotlib.figure import Figure
from plain_gradinit import PlainGradInit
from record import RESULTS, Table, markdown, read, write
from torch import multiprocessing
from workload import ALWAYS_VIOLATED, Contender, Size, batch_pair, config_for, learner_on

from fairseq_gradinit.engine import PRECISION_NAMES, GradInitConfig, Precision, ProcessGroup
from fairseq_gradinit.engine.learner import ScaleLearner

SIZE = Size(6, 256, 1024, 4, vocabulary=4000, sentences=16, length=32)
GPU_SIZE = Size(6, 512, 1024, 4, vocabulary=10_000, sentences=128, length=32)
"""Of IWSLT'14."""
REPETITIONS = 9
ITERATIONS = 24
"""Of whole runs."""

GROWING_SIZE = Size(3, 128, 512, 4, vocabulary=2000, sentences=8, length=32)
LAYERS, WIDTHS, SENTENCES = (3, 6, 12, 24), (128, 256, 384, 512), (4, 8, 16, 32)

STEP, OBJECTIVE = "training step", "objective iteration"
DIFFERENCES, EXACT = "constraint, finite differences", "constraint, double backward"
PLAIN_OBJECTIVE, PLAIN_CONSTRAINT = "plain objective iteration", "plain constraint iteration"
GROWING = (STEP, OBJECTIVE, DIFFERENCES, EXACT)

TIME_TARGETS = {OBJECTIVE: 2.2, DIFFERENCES: 2.3, EXACT: 3.5}
MEMORY_TARGETS = {OBJECTIVE: 1.1, DIFFERENCES: 1.1, EXACT: 2.2}
SPEEDUP_TARGET, MEMORY_TARGET, EFFICIENCY_TARGET = 1.8, 0.6, 0.85

GAMMA_SHARE = 0.8
"""gamma of the whole runs as a share of the norm at the start: both kinds of iterations occur."""


def contenders_for(size: Size, precision: Precision = "fp32") -> dict[str, Contender]:
    def iteration(*settings: Any, kind: type = ScaleLearner) -> Contender:
        config = config_for(*settings, precision=precision)
        return lambda: partial(learner_on(size, config, kind).step, batch_pair(size))

    return {
        STEP: partial(workload.training_step, size, precision),
        OBJECTIVE: iteration(),
        DIFFERENCES: iteration(ALWAYS_VIOLATED, "finite-difference"),
        EXACT: iteration(ALWAYS_VIOLATED, "exact"),
        PLAIN_OBJECTIVE: iteration(kind=PlainGradInit),
        PLAIN_CONSTRAINT: iteration(ALWAYS_VIOLATED, kind=PlainGradInit),
    }


def judged(value: float, *, most: float | None = None, least: float | None = None) -> list[str]:
    """Two cells: `value` with the verdict on it, and the target."""
    if most is None and least is None:
        return [f"{value:.2f}", ""]
    met, target = (
        (value <= most, f"at most {most}") if most else (value >= least, f"at least {least}")
    )
    return [f"{value:.2f}" if met else f"{value:.2f}, **missed**", target]


def described(size: Size, precision: Precision = "fp32") -> str:
    tokens = size.sentences * size.length
    model = f"{size.layers}+{size.layers} layers, d={size.width}, ffn={size.feed_forward}"
    return f"{model}, {tokens} tokens a side, {precision}, {torch.get_default_device().type}"


# ---- The iterations, and whole runs.


def measure_iterations() -> list[Table]:
    seconds, memory = measure(contenders_for(SIZE))
    table = iteration_table(described(SIZE), seconds, memory)
    return [table, run_table(seconds, memory, *whole_runs())]


def measure_on_gpu(device: str = "cuda") -> list[Table]:
    """Without the plain form, which knows fp32 alone."""
    tables = []
    with torch.device(device):
        for precision in PRECISION_NAMES:
            contenders = contenders_for(GPU_SIZE, precision)
            measured = measure({name: contenders[name] for name in GROWING})
            tables.append(iteration_table(described(GPU_SIZE, precision), *measured))
    return tables


def measure(
    contenders: Mapping[Any, Contender],
) -> tuple[dict[Any, list[float]], dict[Any, int]]:
    """Seconds and peak bytes of each."""
    memory = {name: workload.peak_memory(new) for name, new in contenders.items()}
    return workload.interleaved_seconds(contenders, REPETITIONS), memory


def whole_runs() -> tuple[dict[str, float], dict[str, str]]:
    """Times and kinds of iterations of runs that take turns, so that all see the same machine."""
    probe = learner_on(SIZE, config_for())
    probe.step(batch_pair(SIZE))
    gamma = GAMMA_SHARE * probe.learned().history[0].grad_norm
    lr = GradInitConfig.lr
    plain = learner_on(SIZE, config_for(gamma, lr=lr), PlainGradInit)
    ours = {
        DIFFERENCES: learner_on(SIZE, config_for(gamma, "finite-difference", lr)),
        EXACT: learner_on(SIZE, config_for(gamma, "exact", lr)),
    }
    learners = {"plain": plain, **ours}
    seconds = dict.fromkeys(learners, 0.0)
    for seed in range(ITERATIONS):
        pair = batch_pair(SIZE, seed)
        for name, learner in learners.items():
            seconds[name] += workload.seconds_for(partial(learner.step, pair))
    kinds = {name: [i.kind for i in learner.learned().history] for name, learner in ours.items()}
    mixes = {
        name: f"{found.count('objective')} objective and {found.count('constraint')} constraint "
        "iterations"
        for name, found in {"plain": plain.kinds, **kinds}.items()
    }
    return seconds, mixes


def iteration_table(
    of_what: str, seconds: Mapping[str, Sequence[float]], memory: Mapping[str, int]
) -> Table:
    """Time and memory of every contender, absolute and in training steps."""
    rows = []
    for name, times in seconds.items():
        time, lowest, highest = (f"{1e3 * of(times):.4g}" for of in (median, min, max))
        of_step = median(times) / median(seconds[STEP])
        rows.append(
            [
                *(name, f"{time} ({lowest} to {highest})"),
                *judged(of_step, most=TIME_TARGETS.get(name)),
                f"{memory[name] / 2**20:.4g}",
                *judged(memory[name] / memory[STEP], most=MEMORY_TARGETS.get(name)),
            ]
        )
    header = ["", "ms (lowest to highest)", "of a step", "target", "peak MiB", "of training"]
    return Table(f"Iterations, {of_what}", [*header, "target"], rows)


def run_table(
    iterations: Mapping[str, Sequence[float]],
    memory: Mapping[str, int],
    runs: Mapping[str, float],
    mixes: Mapping[str, str],
) -> Table:
    """Whole runs against the plain form."""
    objective = median(iterations[PLAIN_OBJECTIVE]) / median(iterations[OBJECTIVE])
    constraint = median(iterations[PLAIN_CONSTRAINT]) / median(iterations[DIFFERENCES])
    share = max(memory[OBJECTIVE], memory[DIFFERENCES])
    share /= max(memory[PLAIN_OBJECTIVE], memory[PLAIN_CONSTRAINT])
    results = {
        f"faster with finite differences ({mixes[DIFFERENCES]}), times": judged(
            runs["plain"] / runs[DIFFERENCES], least=SPEEDUP_TARGET
        ),
        f"faster with double backward ({mixes[EXACT]}), times": judged(runs["plain"] / runs[EXACT]),
        "the same, all iterations objective, times": judged(objective),
        "the same, all iterations constraint, times": judged(constraint),
        "memory with finite differences, of plain": judged(share, most=MEMORY_TARGET),
    }
    title = f"Whole runs against the plain form ({mixes['plain']}), {described(SIZE)}"
    rows = [[name, *cells] for name, cells in results.items()]
    return Table(title, ["", "measured", "target"], rows)


# ---- Growth: all contenders should grow as a training step does.


Axis = tuple[str, str, Sequence[float], Sequence[Size]]
"""A way to grow: its name, its unit, positions along which growth should be linear, their sizes."""
Quantities = Mapping[tuple[Size, str], float]


def measure_growth() -> list[Table]:
    base = GROWING_SIZE
    wider = [replace(base, width=width, feed_forward=4 * width) for width in WIDTHS]
    # As matrix products grow, when the width changes.
    models = map(workload.new_model, wider)
    parameters = [sum(p.numel() for p in model.parameters()) / 1e6 for model in models]
    deeper = [replace(base, layers=layers) for layers in LAYERS]
    larger = [replace(base, sentences=sentences) for sentences in SENTENCES]
    axes = [
        ("depth", "layers", [2 * layers for layers in LAYERS], deeper),
        ("width", "million parameters", parameters, wider),
        ("batch", "sentences", SENTENCES, larger),
    ]
    contenders = {
        (size, name): contenders_for(size)[name]
        # The axes have a size in common.
        for size in dict.fromkeys([*deeper, *wider, *larger])
        for name in GROWING
    }
    times, memory = measure(contenders)
    seconds = {key: median(found) for key, found in times.items()}
    save_picture(RESULTS / "scaling-cpu.png", axes, seconds, memory)
    return [growth_table(axes, seconds, memory)]


def straight(positions: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """The values on the least-squares line."""
    return np.polyval(np.polyfit(positions, values, 1), positions)


def departure(positions: Sequence[float], values: Sequence[float]) -> float:
    """The largest distance from the least-squares line, as a share of the largest value."""
    return float(np.abs(straight(positions, values) - values).max() / max(values))


def growth_table(axes: Sequence[Axis], *quantities: Quantities) -> Table:
    rows = []
    for axis, unit, at, sizes in axes:
        for name in GROWING:
            row = [f"{axis}, {at[0]:.3g} to {at[-1]:.3g} {unit}", name]
            for of in quantities:
                values = [of[size, name] for size in sizes]
                ratios = [of[size, name] / of[size, STEP] for size in sizes]
                row += [f"{departure(at, values):.1%}", ", ".join(f"{r:.2f}" for r in ratios)]
            rows.append(row)
    header = ["", "", "time off a line", "of a step", "memory off a line", "of training"]
    return Table("Growth with depth, width and batch", header, rows)


def save_picture(path: Path, axes: Sequence[Axis], *quantities: Quantities) -> None:
    """Time above, memory below, one column for each axis; dashed are the least-squares lines."""
    figure = Figure(figsize=(12, 6))
    panels = figure.subplots(2, 3)
    for (axis, unit, at, sizes), column in zip(axes, panels.T, strict=True):
        for panel, of, one in zip(column, quantities, (1e-3, 2**20), strict=True):
            for name in GROWING:
                values = [of[size, name] / one for size in sizes]
                (dashed,) = panel.plot(at, straight(at, values), "--", linewidth=0.8)
                panel.plot(at, values, "o", color=dashed.get_color(), label=name)
            panel.set_xlim(left=0)
            panel.set_ylim(bottom=0)
        column[0].set_title(axis)
        column[1].set_xlabel(unit)
    panels[0, 0].set_ylabel("ms")
    panels[1, 0].set_ylabel("peak MiB")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="lower center", ncol=len(GROWING))
    figure.tight_layout(rect=(0.0, 0.05, 1.0, 1.0))
    figure.savefig(path, dpi=100)


# ---- Two processes, with a core each; a process always has as many sentences.


def worker(rank: int, folder: str) -> None:
    """Rank 0 writes its median seconds of an iteration, for both kinds of iterations:

    - while the other process waits;
    - while it does the same for itself: what that loses, the machine loses and not GradInit;
    - of one GradInit that the processes share, which sum their gradients over gloo.
    """
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    pair = batch_pair(SIZE, seed=rank)
    found = []
    for config in (config_for(), config_for(ALWAYS_VIOLATED, "finite-difference")):
        own = learner_on(SIZE, config)
        shared = learner_on(SIZE, config, ScaleLearner, ProcessGroup())
        steps = [partial(learner.step, pair) for learner in (own, own, shared)]
        if rank != 0:
            steps[0] = list
        times: list[list[float]] = [[], [], []]
        for _ in range(1 + REPETITIONS):
            for step, taken in zip(steps, times, strict=True):
                torch.distributed.barrier()
                taken.append(workload.seconds_for(step))
        found.append([median(taken[1:]) for taken in times])
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def measure_processes() -> list[Table]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(worker, (folder,), nprocs=2, start_method="fork")
        found = json.loads(Path(folder, "times.json").read_text(encoding="utf-8"))
    rows = []
    for kind, (alone, unconnected, together) in zip(("objective", DIFFERENCES), found, strict=True):
        efficiency = judged(alone / together, least=EFFICIENCY_TARGET)
        times = f"{1e3 * alone:.4g}", f"{1e3 * together:.4g}"
        rows.append([kind, *times, *efficiency, f"{alone / unconnected:.2f}"])
    title = (
        f"Two processes against one, {SIZE.layers}+{SIZE.layers} layers, d={SIZE.width}, "
        f"{SIZE.sentences * SIZE.length} tokens a side in each process"
    )
    header = ["", "one, ms", "two, ms", "efficiency", "target", "two that share nothing"]
    return [Table(title, header, rows)]


# ---- The program.


PARTS = {
    "cost": ("cost-cpu.json", measure_iterations),
    "gpu": ("cost-cuda.json", measure_on_gpu),
    "scaling": ("scaling-cpu.json", measure_growth),
    "processes": ("processes-cpu.json", measure_processes),
}
"""For each where its results are kept, and what measures them."""


def kept_tables() -> str:
    """Markdown of all results."""
    paths = (RESULTS / name for name, _ in PARTS.values())
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
    parser.add_argument("--table", action="store_true", help="print what is kept, measure nothing")
    options = parser.parse_args(arguments)
    if not options.table:
        torch.set_num_threads(1)
        name, measure_part = PARTS[options.part]
        write(RESULTS / name, "tables", [*map(asdict, measure_part())])
    print(kept_tables(), end="")


if __name__ == "__main__":
    main()
