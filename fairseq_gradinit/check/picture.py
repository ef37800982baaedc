"""The picture of a check: what became of the starts in their first updates, at every rate.

Needs matplotlib (`pip install 'fairseq-gradinit[plot]'`).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fairseq_gradinit.check.records import Arm, Probe
from fairseq_gradinit.check.verdict import ALIVE, COLLAPSED, judge

STYLES = {
    Arm("default", warmup=False): ("#c0392b", "o"),
    Arm("default", warmup=True): ("#1b3a6b", "s"),
    Arm("gradinit", warmup=False): ("#2e8b57", "^"),
}
DASHES = ("-", "--", ":", "-.")
"""For the sides of the model."""


def draw(probes: Sequence[Probe]) -> Figure:
    """A column for each rate: the loss, the shares of the last layers, the sizes of the updates."""
    rates = sorted({probe.lr for probe in probes})
    figure = Figure(figsize=(2 + 3.5 * len(rates), 9), layout="constrained")
    grid = figure.subplots(3, len(rates), squeeze=False, sharex=True, sharey="row")
    for (losses, shares, steps), rate in zip(grid.T, rates, strict=True):
        for probe in (p for p in probes if p.lr == rate):
            _draw_probe(probe, losses, shares, steps)
        losses.set_title(f"lr {rate:g}")
        losses.legend(fontsize=8)
        shares.set_yscale("log")
        shares.axhspan(COLLAPSED, ALIVE, color="0.9", zorder=0)
        steps.set_yscale("log")
        steps.set_xlabel("updates")
    grid[0][0].set_ylabel("training loss")
    sides = dict.fromkeys(side for probe in probes for side in probe.last_layer_shares())
    lines = ", ".join(f"{side} {dash}" for side, dash in zip(sides, DASHES, strict=False))
    grid[1][0].set_ylabel(f"token-dependent share, last layers\n{lines}")
    grid[2][0].set_ylabel("size of an update over that of its weights\n(median over the tensors)")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    return figure


def _draw_probe(probe: Probe, losses: Axes, shares: Axes, steps: Axes) -> None:
    (colour, marker), updates = STYLES[probe.arm], range(1, len(probe.updates) + 1)
    label = f"{probe.arm.title}: {judge(probe).outcome}"
    losses.plot(updates, [update.loss for update in probe.updates], color=colour, label=label)
    looked = [look.update for look in probe.looks]
    for curve, dash in zip(probe.last_layer_shares().values(), DASHES, strict=False):
        # What is zero has no place on a logarithmic axis.
        drawn = [max(share, 1e-16) for share in curve]
        shares.plot(looked, drawn, dash, color=colour, marker=marker, ms=3)
    sizes = [median(update.step_sizes) for update in probe.updates]
    steps.plot(updates, sizes, color=colour)
