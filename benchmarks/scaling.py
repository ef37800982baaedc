"""How GradInit's time and peak memory grow with depth, width and batch.

    python benchmarks/scaling.py        on one CPU core, about 3 minutes

All contenders should grow as a training step does: linearly in the layers, in the sentences of a
batch, and, as matrix products do, in the number of parameters when the width changes. Writes a
picture next to the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from cost import (
    DIFFERENCES,
    EXACT,
    OBJECTIVE,
    STEP,
    add_device_options,
    contenders_for,
    usual_parser,
)
from record import Table, markdown, read, write
from workload import Schedule, Size, Workload, interleaved_seconds, peak_memory

mpl.use("Agg")
from matplotlib import pyplot

CONTENDERS = (STEP, OBJECTIVE, DIFFERENCES, EXACT)


@dataclass(frozen=True)
class Axis:
    """One way to grow.

    Attributes:
        unit: of `position`.
        position: where a size stands on the axis that growth should be linear along.
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

    axis: str
    contender: str
    positions: Sequence[float]
    seconds: Sequence[float]
    bytes: Sequence[int]


def axes_for(device: str, quick: bool) -> list[Axis]:
    if quick:
        base = Size(1, 16, 32, 2, vocabulary=50, sentences=2, length=6)
        depths, widths, batches = (1, 2, 3), (16, 32, 48), (2, 4, 6)
    elif device == "cpu":
        base = Size(3, 128, 512, 4, vocabulary=2000, sentences=8, length=32)
        depths, widths, batches = (3, 6, 12, 24), (128, 256, 384, 512), (4, 8, 16, 32)
    else:
        base = Size(6, 512, 2048, 8, vocabulary=10_000, sentences=64, length=32)
        depths, widths, batches = (3, 6, 12, 24), (256, 512, 768, 1024), (32, 64, 128, 256)
    ratio = base.feed_forward // base.width
    wider = [replace(base, width=width, feed_forward=ratio * width) for width in widths]
    return [
        Axis("depth", "layers", layers_of, [replace(base, layers=n) for n in depths]),
        Axis("width", "million parameters", parameters_of, wider),
        Axis("batch", "sentences", sentences_of, [replace(base, sentences=n) for n in batches]),
    ]


def layers_of(size: Size) -> float:
    """Of encoder and decoder together."""
    return 2.0 * size.layers


def sentences_of(size: Size) -> float:
    return float(size.sentences)


def parameters_of(size: Size) -> float:
    return sum(p.numel() for p in Workload(size).model().parameters()) / 1e6


@dataclass(frozen=True)
class Cost:
    """Median seconds, and peak bytes."""

    seconds: float
    bytes: int


def measure(sizes: Iterable[Size], device: str, schedule: Schedule) -> dict[tuple[Size, str], Cost]:
    """The cost of every contender at every size; all of them take turns."""
    contenders = {}
    for size in sizes:
        every = contenders_for(Workload(size, device))
        contenders |= {(size, name): every[name] for name in CONTENDERS}
    memory = {key: peak_memory(new, device) for key, new in contenders.items()}
    seconds = interleaved_seconds(contenders, schedule, device)
    return {key: Cost(seconds[key].median, memory[key]) for key in contenders}


def lines_along(axis: Axis, costs: Mapping[tuple[Size, str], Cost]) -> list[Line]:
    positions = [axis.position(size) for size in axis.sizes]
    return [
        Line(
            axis.name,
            contender,
            positions,
            seconds=[costs[size, contender].seconds for size in axis.sizes],
            bytes=[costs[size, contender].bytes for size in axis.sizes],
        )
        for contender in CONTENDERS
    ]


def straight(positions: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """The values on the least-squares line."""
    return np.polyval(np.polyfit(positions, values, 1), positions)


def departure(positions: Sequence[float], values: Sequence[float]) -> float:
    """The largest distance from the least-squares line, as a share of the largest value."""
    return float(np.abs(straight(positions, values) - values).max() / max(values))


def table_of(axes: Sequence[Axis], lines: Sequence[Line]) -> Table:
    rows = []
    for axis in axes:
        along = [line for line in lines if line.axis == axis.name]
        step = along[0]
        for line in along:
            ends = f"{line.positions[0]:.3g} to {line.positions[-1]:.3g} {axis.unit}"
            rows.append(
                [
                    f"{axis.name}, {ends}",
                    line.contender,
                    f"{departure(line.positions, line.seconds):.1%}",
                    _ratios(line.seconds, step.seconds),
                    f"{departure(line.positions, line.bytes):.1%}",
                    _ratios(line.bytes, step.bytes),
                ]
            )
    header = ["", "", "time off a line", "of a step", "memory off a line", "of training"]
    return Table("Growth with depth, width and batch", header, rows)


def _ratios(values: Sequence[float], steps: Sequence[float]) -> str:
    return ", ".join(f"{value / step:.2f}" for value, step in zip(values, steps, strict=True))


def plot(axes: Sequence[Axis], lines: Sequence[Line], path: Path) -> None:
    """Time above, memory below, one column for each axis; dashed are the least-squares lines."""
    figure, panels = pyplot.subplots(2, len(axes), figsize=(4 * len(axes), 6), squeeze=False)
    for column, axis in enumerate(axes):
        upper, lower = panels[:, column]
        for line in lines:
            if line.axis == axis.name:
                _draw(upper, line, 1e3 * np.array(line.seconds))
                _draw(lower, line, np.array(line.bytes) / 2**20)
        upper.set_title(axis.name)
        lower.set_xlabel(axis.unit)
        for panel in (upper, lower):
            panel.set_xlim(left=0)
            panel.set_ylim(bottom=0)
    panels[0, 0].set_ylabel("ms")
    panels[1, 0].set_ylabel("peak MiB")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="lower center", ncol=len(CONTENDERS)
    )
    figure.tight_layout(rect=(0.0, 0.05, 1.0, 1.0))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _draw(panel: pyplot.Axes, line: Line, values: np.ndarray) -> None:
    (fit,) = panel.plot(line.positions, straight(line.positions, values), "--", linewidth=0.8)
    panel.plot(line.positions, values, "o", color=fit.get_color(), label=line.contender)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = usual_parser(__doc__)
    add_device_options(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    schedule = Schedule(1, 2) if options.quick else Schedule(1, 7)
    if options.device == "cuda":
        schedule = replace(schedule, warmup=3, calls=5)
    axes = axes_for(options.device, options.quick)
    # The axes have a size in common.
    sizes = dict.fromkeys(size for axis in axes for size in axis.sizes)
    costs = measure(sizes, options.device, schedule)
    lines = [line for axis in axes for line in lines_along(axis, costs)]
    path = options.results / f"scaling-{options.device}.json"
    results = {"tables": [asdict(table_of(axes, lines))], "lines": [*map(asdict, lines)]}
    write(path, results)
    plot(axes, lines, path.with_suffix(".png"))
    print(markdown(read(path)), end="")


if __name__ == "__main__":
    main()
