"""The report: what it shows of runs, as a page."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from fairseq_gradinit.cli import command
from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.report import figures, page
from fairseq_gradinit.report.figures import Panel, Run
from fairseq_gradinit.scales import EFFECT_FILE, SCALES_FILE, BlockScale, Change, Effect, Scales

BLOCKS = tuple(
    BlockScale(f"{side}.layers.{layer}.{kind}", (4, 4), 1.5 - 0.25 * layer, "learned")
    for side in ("encoder", "decoder")
    for layer in range(3)
    for kind in ("self_attn.q_proj.weight", "self_attn.q_proj.bias", "fc1.weight")
)
HISTORY = (
    Iteration(1, "constraint", 9.5, None, 2000.0, 0.9, 1.1),
    Iteration(2, "objective", 9.25, 8.125, 900.0, 0.8, 1.2),
    Iteration(3, "objective", 9.0, 7.5, 800.0, 0.75, 1.5),
)
LEARNED = Scales(
    (*BLOCKS, BlockScale("embed.weight", (9, 4), 0.25, "learned")),
    {"gradinit": "0", "gamma": "1000", "seed": "1"},
    HISTORY,
)
SHARES = tuple(Change(f"encoder.layers.{i}.ffn", 0.3, 0.01 * i) for i in range(3))
RUN = Run("first", LEARNED, SHARES)
BARE = Run("bare", Scales(BLOCKS, {"gradinit": "0", "gamma": "off", "seed": "2"}))


def test_the_program_writes_a_page_into_the_folder_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    LEARNED.save(tmp_path / "run" / SCALES_FILE)
    Effect(LEARNED.signature, (), SHARES).save(tmp_path / "run" / EFFECT_FILE)
    assert page.read_run(Path("run")) == replace(RUN, label="run")
    BARE.scales.save(tmp_path / "alone.json")
    for words, out in (
        (["run"], "run/report.html"),
        (["run", "alone.json"], "report.html"),
        (["run", "--out", "page"], "page.html"),
    ):
        assert command.main(["report", *words]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        assert " ".join(["fairseq-gradinit report", *words]) in Path(out).read_text()
    assert command.main(["report", "absent"]) == 1
    assert capsys.readouterr().err.startswith("fairseq-gradinit: cannot read absent")


# ---- What is drawn.


def drawn(panel: Panel) -> Axes:
    (axes,) = figures.figure_of(panel).axes
    return axes


def curves(axes: Axes, style: str = "-") -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): list(zip(*map(list, line.get_data()), strict=True))
        for line in axes.lines
        if line.get_linestyle() == style
    }


def test_scales_are_a_heat_map_for_each_stack_and_run():
    panels = figures.scales([RUN, BARE])
    assert [(panel.run, panel.title) for panel in panels] == [
        *(("first", "encoder.layers"), ("first", "decoder.layers")),
        *(("first", "outside the layers"), ("bare", "encoder.layers"), ("bare", "decoder.layers")),
    ]
    axes = drawn(panels[0])
    kinds = ["self_attn.q_proj", "self_attn.q_proj.bias", "fc1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == kinds
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    assert [text.get_text() for text in axes.texts] == ["1.50", "1.25", "1.00"] * 3


def test_given_scales_are_in_italics_and_tensors_left_alone_are_not_shown():
    fixed = replace(BLOCKS[2], scale=0.1, state="fixed")
    alone = replace(BLOCKS[0], scale=1.0, state="norm gain")
    (panel,) = figures.scales([Run("", Scales((fixed, alone), {}))])
    (text,) = drawn(panel).texts
    assert (text.get_text(), text.get_style()) == ("0.10", "italic")


def test_branches_are_drawn_before_and_after():
    (panel,) = figures.branches([RUN, BARE])
    axes = drawn(panel)
    assert list(curves(axes, "--").values()) == [[(0, 0.3), (1, 0.3), (2, 0.3)]]
    # A logarithmic axis has no place for the first one, which is zero.
    assert curves(axes) == {"ffn": [(0, figures.LEAST_SHARE), (1, 0.01), (2, 0.02)]}
    assert figures.branches([BARE]) == []


def test_iterations_are_drawn_with_gamma_if_there_is_one():
    losses, norms = map(drawn, figures.iterations([RUN, BARE]))
    assert curves(losses) == {"before the trial step": [(1, 9.5), (2, 9.25), (3, 9.0)]}
    assert curves(losses, "--") == {"after it": [(2, 8.125), (3, 7.5)]}
    points = curves(norms, "None")
    assert points == {"objective": [(2, 900.0), (3, 800.0)], "constraint": [(1, 2000.0)]}
    assert {y for _, y in curves(norms, "--")["gamma 1000"]} == {1000.0}
    free = replace(RUN, scales=replace(LEARNED, settings={"gamma": "off"}))
    assert [panel.title for panel in figures.iterations([free])] == ["loss"]


def deep_run() -> Run:
    """Twelve layers, tensors with long names, and every branch that fairseq's layers have."""
    parts = ("self_attn", "encoder_attn", "ffn")
    kinds = [f"{part}.{name}" for part in parts for name in ("out_proj.weight", "v_proj.bias")]
    kinds.append("mixture.experts_of_the_feed_forward.lora_A.default.weight")
    names = [f"decoder.layers.{i}.{kind}" for i in range(12) for kind in kinds]
    blocks = tuple(BlockScale(name, (1,), 0.1 + i / 9, "learned") for i, name in enumerate(names))
    shares = [f"decoder.layers.{i}.{part}" for i in range(12) for part in parts]
    return Run(
        "deep",
        Scales(blocks, {"gamma": "1"}, HISTORY),
        tuple(Change(name, 0.2, 1e-5) for name in shares),
    )


@pytest.mark.parametrize("title", page.FIGURES)
def test_texts_are_on_the_canvas_and_beside_each_other(monkeypatch, title):
    seen: list[Text] = []
    draw = Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, *rest: (seen.append(self), draw(self, *rest)))
    panels_of, _ = page.FIGURES[title]
    for figure in map(figures.figure_of, panels_of([RUN, deep_run()])):
        canvas = FigureCanvasAgg(figure)
        seen.clear()
        canvas.draw()
        found = {text for text in seen if text.get_text() and text.get_visible()}
        assert found
        boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in found]
        for text, box in boxes:
            # Letters of browsers may be wider than matplotlib's.
            union = figure.bbox.union([figure.bbox, box.padded(5, 0)])
            assert union.bounds == figure.bbox.bounds, text
        for (one, box), (other, beside) in combinations(boxes, 2):
            assert not box.overlaps(beside), (one, other)


def test_no_two_series_look_alike():
    for panels_of, _ in page.FIGURES.values():
        for panel in panels_of([RUN, deep_run()]):
            looks = [
                (line.get_color(), line.get_marker(), line.get_linestyle(), line.get_fillstyle())
                for line in figures.figure_of(panel).axes[0].lines
            ]
            assert len(set(looks)) == len(looks), panel.title


# ---- The page.


@pytest.fixture(scope="module")
def text() -> str:
    return page.page([RUN, BARE], "the command")


def test_the_page_needs_nothing_beside_it_and_is_the_same_for_the_same_runs(text):
    assert text.count("<svg") == 8
    # Figures are in the colour of the text, which is light on dark where the reader wants it.
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert figures.INK not in text
    assert not re.findall(r"<script|<link|@import|\ssrc=|url\((?!#)", text)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))
    assert page.page([RUN, BARE], "the command") == text


def test_names_are_text_and_not_markup():
    name = '<script>alert("x")</script>'
    blocks = (BlockScale(f"encoder.layers.0.{name}.weight", (1,), 1.0, "learned"),)
    text = page.page([Run(name, Scales(blocks, {"seed": name}, HISTORY))], name)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 4


def test_the_tables_have_scales_iterations_losses_and_settings(text):
    text = re.sub(r"\s+", " ", text).replace("> <", "><")
    for row in (
        "<th>tensors with a learned scale</th><td>19 of 19</td><td>18 of 18</td>",
        "<th>smallest learned scale</th><td>0.25 (embed.weight)</td><td>1 (",
        "<th>iterations</th><td>3, 1 of them for the constraint</td><td>not recorded</td>",
        "<th>loss before the trial step</th><td>9.500 to 9.000</td><td></td>",
        "<th>loss after the trial step</th><td>8.125 to 7.500</td><td></td>",
        # Those in which the runs differ come first.
        '<tr class="differs"><th>gamma</th><td>1000</td><td>off</td></tr>'
        '<tr class="differs"><th>seed</th><td>1</td><td>2</td></tr>'
        "<tr><th>gradinit</th><td>0</td><td>0</td></tr>",
    ):
        assert row in text
