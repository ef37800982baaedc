"""The picture of a run."""

from __future__ import annotations

from matplotlib.figure import Figure

from fairseq_gradinit.report.plot import draw_curves, save_picture
from fairseq_gradinit.scales.file import BlockScale, Scales

SCALES = Scales(
    (
        BlockScale("embed.weight", (4, 2), 0.5, "learned"),
        BlockScale("layers.0.fc.weight", (2, 2), 0.0, "learned"),
        BlockScale("layers.1.fc.weight", (2, 2), 3.0, "learned"),
        BlockScale("layers.0.norm.weight", (2,), 1.0, "norm gain"),
    ),
    settings={},
)


def test_the_picture_is_a_png(tmp_path):
    save_picture(tmp_path / "p.png", {"run": [(1, 9.0), (2, 8.0)]}, SCALES)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_for_each_run():
    axes = Figure().subplots()
    draw_curves(axes, {"a": [(1, 9.0), (2, 8.0)], "b": [(1, 7.0)]})
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert list(axes.lines[0].get_ydata()) == [9.0, 8.0]
