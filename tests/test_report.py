"""The report: what it shows of runs, as a page, as pictures, and in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from fairseq_gradinit.cli import command
from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.report import figures as report_figures
from fairseq_gradinit.report import page as report
from fairseq_gradinit.report.command import page_file
from fairseq_gradinit.report.figures import Panel
from fairseq_gradinit.report.runs import Run, read_runs
from fairseq_gradinit.scales import effect
from fairseq_gradinit.scales import file as scales
from fairseq_gradinit.scales.effect import Change, Effect
from fairseq_gradinit.scales.file import BlockScale, Scales

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
EFFECT = Effect(
    LEARNED.signature,
    tuple(Change(block.name, 4.0, 4.0 * block.scale) for block in LEARNED.blocks),
    tuple(Change(f"encoder.layers.{i}.ffn", 0.3, 0.01 * i) for i in range(3)),
)
RUN = Run("first", LEARNED, EFFECT)
BARE = Run("bare", Scales(BLOCKS, {"gradinit": "0", "gamma": "off", "seed": "2"}), None)
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


def save_run(folder: Path, run: Run) -> Path:
    folder.mkdir(parents=True)
    run.scales.save(folder / scales.SCALES_FILE)
    if run.effect:
        run.effect.save(folder / effect.EFFECT_FILE)
    return folder


# ---- Which runs.


def test_runs_are_read_from_folders_and_files(tmp_path):
    first = save_run(tmp_path / "first", RUN)
    save_run(tmp_path / "recipe" / "checkpoints", RUN)
    alone = tmp_path / "alone.json"
    BARE.scales.save(alone)
    runs = read_runs([first, tmp_path / "recipe", alone])
    assert [run.label for run in runs] == [str(first), str(tmp_path / "recipe"), str(alone)]
    assert [run.scales for run in runs] == [LEARNED, LEARNED, BARE.scales]
    assert [run.effect for run in runs] == [EFFECT, EFFECT, None]


def test_a_record_of_other_scales_is_left_out(tmp_path, caplog):
    folder = save_run(tmp_path / "run", replace(RUN, effect=replace(EFFECT, signature="other")))
    assert read_runs([folder])[0].effect is None
    assert "gradinit_effect.json is of other scales than" in caplog.text


def test_files_that_are_no_run_are_refused(tmp_path):
    with pytest.raises(GradInitError, match=r"there is no gradinit_scales.json in .*--save-dir"):
        read_runs([tmp_path])
    with pytest.raises(GradInitError, match="cannot read"):
        read_runs([tmp_path / "absent.json"])
    folder = save_run(tmp_path / "run", RUN)
    with pytest.raises(GradInitError, match="the same run is given twice"):
        read_runs([folder, folder / scales.SCALES_FILE])


def test_gamma_is_that_of_the_signature():
    assert RUN.gamma == 1000.0
    assert BARE.gamma is None
    assert replace(BARE, scales=replace(LEARNED, settings={})).gamma is None


# ---- What is drawn.


def test_stacks_are_kinds_of_tensors_by_layer():
    names = [
        *("encoder.layers.0.fc1.weight", "encoder.layers.2.fc1.weight", "embed.weight"),
        *("decoder.layers.0.fc1.bias", "models.de-en.decoder.layers.0.self_attn", "3.weight"),
    ]
    items = {name: Change(name, 1.0, 2.0) for name in names}
    assert report_figures.stacks_of(items.values()) == {
        "encoder.layers": {"fc1.weight": {0: items[names[0]], 2: items[names[1]]}},
        "decoder.layers": {"fc1.bias": {0: items[names[3]]}},
        "models.de-en.decoder.layers": {"self_attn": {0: items[names[4]]}},
        "": {"embed.weight": {0: items["embed.weight"]}, "3.weight": {0: items["3.weight"]}},
    }


def drawn(panel: Panel) -> Axes:
    (axes,) = report_figures.figure_of([panel]).axes
    return axes


def curves(axes: Axes, style: str = "-") -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): list(zip(*map(list, line.get_data()), strict=True))
        for line in axes.lines
        if line.get_linestyle() == style
    }


def test_scales_are_a_heat_map_for_each_stack_and_run():
    panels = report_figures.scales([RUN, BARE])
    assert [(panel.run, panel.title) for panel in panels] == [
        *(("first", "encoder.layers"), ("first", "decoder.layers")),
        *(("first", "outside the layers"), ("bare", "encoder.layers"), ("bare", "decoder.layers")),
    ]
    axes = drawn(panels[0])
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("self_attn.q_proj", "self_attn.q_proj.bias", "fc1")
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    assert [text.get_text() for text in axes.texts] == ["1.50", "1.25", "1.00"] * 3


def test_given_scales_are_in_italics_and_tensors_left_alone_are_not_shown():
    blocks = [replace(block, scale=0.1, state="fixed") for block in BLOCKS[2:3]]
    blocks += [replace(block, scale=1.0, state="norm gain") for block in BLOCKS[:1]]
    (panel,) = report_figures.scale_panels(Scales(tuple(blocks), {}))
    (text,) = drawn(panel).texts
    assert (text.get_text(), text.get_style()) == ("0.10", "italic")
    assert report_figures.scale_panels(Scales(tuple(blocks[1:]), {})) == []


def test_branches_are_drawn_before_and_after():
    (panel,) = report_figures.branches([RUN, BARE])
    axes = drawn(panel)
    assert list(curves(axes, "--").values()) == [[(0, 0.3), (1, 0.3), (2, 0.3)]]
    # A logarithmic axis has no place for the first one, which is zero.
    assert curves(axes) == {"ffn": [(0, report_figures.LEAST_SHARE), (1, 0.01), (2, 0.02)]}


def test_iterations_are_drawn_with_gamma():
    losses, norms = map(drawn, report_figures.iterations([RUN, BARE]))
    assert curves(losses) == {"before the trial step": [(1, 9.5), (2, 9.25), (3, 9.0)]}
    assert curves(losses, "--") == {"after it": [(2, 8.125), (3, 7.5)]}
    points = curves(norms, "None")
    assert points == {"objective": [(2, 900.0), (3, 800.0)], "constraint": [(1, 2000.0)]}
    assert {y for _, y in curves(norms, "--")["gamma 1000"]} == {1000.0}


def test_iterations_without_gamma_have_no_norms():
    run = replace(RUN, scales=replace(LEARNED, settings={"gamma": "off"}))
    assert [panel.title for panel in report_figures.iterations([run])] == ["loss"]


def test_figures_without_data_are_empty():
    assert report_figures.branches([BARE]) == report_figures.iterations([BARE]) == []


def deep_run() -> Run:
    """Twelve layers, tensors with long names, and every branch that fairseq's layers have."""
    parts = ("self_attn", "encoder_attn", "ffn")
    kinds = [f"{part}.{name}" for part in parts for name in ("out_proj.weight", "v_proj.bias")]
    kinds.append("mixture.experts_of_the_feed_forward.lora_A.default.weight")
    names = [f"decoder.layers.{i}.{kind}" for i in range(12) for kind in kinds]
    blocks = tuple(BlockScale(name, (1,), 0.1 + i / 9, "learned") for i, name in enumerate(names))
    shares = [f"decoder.layers.{i}.{part}" for i in range(12) for part in parts]
    effect = Effect("gamma:1", (), tuple(Change(name, 0.2, 1e-5) for name in shares))
    return Run("a/rather/long/folder/" * 4, Scales(blocks, {"gamma": "1"}, HISTORY), effect)


@pytest.mark.parametrize("kind", report.FIGURES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("runs", [[RUN], [RUN, deep_run()]], ids=["one", "two"])
def test_texts_are_on_the_canvas_and_beside_each_other(monkeypatch, kind, runs):
    panels = kind.panels(runs)
    seen: list[Text] = []
    draw = Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, *rest: (seen.append(self), draw(self, *rest)))
    figures = [report_figures.figure_of([panel], titled=False) for panel in panels]
    for figure in [report_figures.figure_of(panels), *figures]:
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
    for panel in [p for kind in report.FIGURES for p in kind.panels([RUN, deep_run()])]:
        looks = [
            (line.get_color(), line.get_marker(), line.get_linestyle(), line.get_fillstyle())
            for line in drawn(panel).lines
        ]
        assert len(set(looks)) == len(looks), panel.title


def test_a_branch_has_one_colour_in_all_panels():
    shares = (*EFFECT.shares, *(Change(f"decoder.layers.0.{b}", 0.1, 0.1) for b in ("a", "ffn")))
    panels = report_figures.branches([replace(RUN, effect=replace(EFFECT, shares=shares))])
    colours = [{x.get_label(): x.get_color() for x in drawn(p).lines}["ffn"] for p in panels]
    assert len(colours) == 2
    assert len(set(colours)) == 1


def test_dollar_signs_are_no_formulas():
    blocks = tuple(replace(b, name=b.name.replace("fc1", "$x$_{2} $")) for b in BLOCKS)
    panels = report_figures.scale_panels(Scales(blocks, {}))
    assert b"$x$_{2} $" in report_figures.render(panels, "scales", "svg")


# ---- The page.


@pytest.fixture(scope="module")
def text() -> str:
    return report.page([RUN, BARE], "the command")


def test_the_page_needs_nothing_beside_it(text):
    assert text.count("<svg") == 8
    assert not re.findall(r"<script|<link|@import|\ssrc=|url\((?!#)", text)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))


def test_the_page_is_the_same_for_the_same_runs(text):
    assert report.page([RUN, BARE], "the command") == text


def test_ids_are_not_shared_between_the_figures(text):
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(
        re.findall(r'xlink:href="#([^"]+)"', text)
    )
    defined = re.findall(r'id="([^"]+)"', text)
    assert used
    assert all(defined.count(name) == 1 for name in used)


def test_names_are_text_and_not_markup():
    name = '<script>alert("x")</script>'
    blocks = (BlockScale(f"encoder.layers.0.{name}.weight", (1,), 1.0, "learned"),)
    run = Run(name, Scales(blocks, {"seed": name}, HISTORY), None)
    text = report.page([run], name)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 4


def test_the_summary_has_scales_iterations_and_losses(text):
    text = re.sub(r"\s+", " ", text).replace("> <", "><")
    for row in (
        "<th>tensors with a learned scale</th><td>19 of 19</td><td>18 of 18</td>",
        "<th>smallest learned scale</th><td>0.25 (embed.weight)</td><td>1 (",
        "<th>iterations</th><td>3, 1 of them for the constraint</td><td>not recorded</td>",
        "<th>loss before the trial step</th><td>9.500 to 9.000</td><td></td>",
        "<th>loss after the trial step</th><td>8.125 to 7.500</td><td></td>",
    ):
        assert row in text


def test_settings_in_which_runs_differ_come_first():
    rows = report.settings_rows([RUN, BARE])
    assert [(row.name, row.values, row.differs) for row in rows] == [
        ("gamma", ("1000", "off"), True),
        ("seed", ("1", "2"), True),
        ("gradinit", ("0", "0"), False),
    ]


# ---- The program.


def test_the_program_writes_page_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", RUN)
    assert command.main(["report", "run", "--png", "pictures"]) == 0
    names = ["scales", "branches", "iterations"]
    written = ["run/report.html", *(f"pictures/{name}.png" for name in names)]
    assert capsys.readouterr().out.split() == written
    assert "fairseq-gradinit report run --png pictures" in Path(written[0]).read_text()
    for path in written[1:]:
        assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("out", "runs", "page"),
    [
        (None, ["run"], "run/report.html"),
        (None, ["run/scales.json"], "run/report.html"),
        (None, ["run", "other"], "report.html"),
        ("run", ["run"], "run/report.html"),
        ("page", ["run"], "page.html"),
        ("page.v2", ["run"], "page.v2.html"),
        ("page.html", ["run"], "page.html"),
    ],
)
def test_the_page_has_a_name_that_browsers_open(tmp_path, monkeypatch, out, runs, page):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    assert page_file(out and Path(out), [*map(Path, runs)]) == Path(page)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["absent"], "cannot read absent"),
        (["run", "--out", "absent/report.html"], "cannot write absent/report.html"),
        (["run", "--png", "file"], "cannot make the folder file: File exists"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", RUN)
    (tmp_path / "file").touch()
    assert command.main(["report", *words]) == 1
    assert capsys.readouterr().err.startswith(f"fairseq-gradinit: {sentence}")


# ---- In a browser.


def browse(profile: Path, *arguments: str) -> None:
    """Run Chromium without a window and without a network."""
    unwanted = ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--no-first-run"),
            *(f"--disable-{what}" for what in unwanted),
            *("--hide-scrollbars", f"--user-data-dir={profile}", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def page(text, tmp_path_factory):
    if not BROWSER:
        pytest.skip("there is no Chromium")
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text)
    return path


def brightness(path: Path) -> np.ndarray:
    """Of every pixel, from 0 to 1; shape (height, width)."""
    return image.imread(path)[..., :3].mean(axis=2)


@pytest.mark.slow
@pytest.mark.parametrize(("dark", "width"), [(False, 1300), (True, 1300), (False, 400)])
def test_the_page_is_legible_in_light_and_dark_and_on_a_narrow_screen(page, tmp_path, dark, width):
    shot = tmp_path / "shot.png"
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    browse(
        tmp_path / "profile",
        *scheme,
        f"--window-size={width},2000",
        f"--screenshot={shot}",
        page.as_uri(),
    )
    seen = brightness(shot)
    ground = np.median(seen)
    assert (ground < 0.2) if dark else (ground > 0.9)
    # Text and lines stand out everywhere: in tables as in figures.
    assert seen.shape == (2000, width)
    for band in np.array_split(seen, 10):
        assert np.abs(band - ground).max() > 0.5


@pytest.mark.slow
def test_the_page_can_be_printed(page, tmp_path):
    paper = tmp_path / "paper.pdf"
    browse(tmp_path / "profile", f"--print-to-pdf={paper}", "--no-pdf-header-footer", page.as_uri())
    content = paper.read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type /Page\b", content)) >= 2
