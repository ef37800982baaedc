"""How well GradInit runs on two processes: the same work per process, on one core each.

    python benchmarks/processes_efficiency.py       about 1 minute on two cores

Efficiency is the time of an iteration of one process that has one core, over that of an iteration
of two processes that have a core each, share every batch, and sum their gradients over gloo. In
both cases a process works on as many sentences. As a control, two processes run side by side and
share nothing: what that loses, the machine loses and not GradInit. The three take turns.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch.distributed
from cost import usual_parser
from record import Table, markdown, reaching, read, write
from torch import multiprocessing
from workload import ALWAYS_VIOLATED, Schedule, Size, Workload, learner_of, seconds_for, settings

from fairseq_gradinit.config import GradInitConfig
from fairseq_gradinit.processes import ProcessGroup

PROCESSES = 2
EFFICIENCY_TARGET = 0.85


@dataclass(frozen=True)
class Times:
    """Median seconds of one iteration of rank 0.

    Attributes:
        alone: while the other process waits.
        unconnected: while the other process does the same for itself.
        together: of one GradInit that the processes share.
    """

    kind: str
    alone: float
    unconnected: float
    together: float

    @property
    def efficiency(self) -> float:
        return self.alone / self.together


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
    violated = settings(workload, ALWAYS_VIOLATED, "finite-difference")
    found = [
        times_of("objective", workload, settings(workload), schedule),
        times_of("constraint, finite differences", workload, violated, schedule),
    ]
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps([*map(asdict, found)]), encoding="utf-8")
    torch.distributed.destroy_process_group()


def measure(workload: Workload, schedule: Schedule) -> list[Times]:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (folder, workload, schedule), PROCESSES)
        found = json.loads(Path(folder, "times.json").read_text(encoding="utf-8"))
    return [Times(**times) for times in found]


def table_of(all_times: Sequence[Times], size: Size) -> Table:
    rows = [
        [
            times.kind,
            f"{1e3 * times.alone:.4g}",
            f"{1e3 * times.together:.4g}",
            reaching(times.efficiency, EFFICIENCY_TARGET),
            f"at least {EFFICIENCY_TARGET}",
            f"{times.alone / times.unconnected:.2f}",
        ]
        for times in all_times
    ]
    title = (
        f"Two processes against one, {size.layers}+{size.layers} layers, d={size.width}, "
        f"{size.sentences * size.length} tokens a side in each process"
    )
    header = ["", "one, ms", "two, ms", "efficiency", "target", "two that share nothing"]
    return Table(title, header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    options = usual_parser(__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    size = Size(6, 256, 1024, 4, vocabulary=4000, sentences=16, length=32)
    schedule = Schedule(warmup=1, repetitions=9)
    if options.quick:
        size = Size(1, 16, 32, 2, vocabulary=50, sentences=4, length=6)
        schedule = Schedule(warmup=1, repetitions=2)
    times = measure(Workload(size), schedule)
    path = options.results / "processes-cpu.json"
    tables = [asdict(table_of(times, size))]
    write(path, {"tables": tables, "size": asdict(size), "times": [*map(asdict, times)]})
    print(markdown(read(path)), end="")


if __name__ == "__main__":
    main()
