"""The report: what it shows of runs, as a page, as pictures, and in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from fairseq_gradinit.cli import command
from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.report import figures as report_figures
from fairseq_gradinit.report import page as report
from fairseq_gradinit.report.figures import Line, lines_of
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
    "gradinit:0|gamma:1000|seed:1",
    HISTORY,
)
EFFECT = Effect(
    LEARNED.signature,
    tuple(Change(block.name, 4.0, 4.0 * block.scale) for block in LEARNED.blocks),
    tuple(Change(f"encoder.layers.{i}.ffn", 0.3, 0.01 * i) for i in range(3)),
)
RUN = Run("first", LEARNED, EFFECT)
BARE = Run("bare", Scales(BLOCKS, "gradinit:0|gamma:off|seed:2"), None)
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
    with pytest.raises(GradInitError, match="cannot read the scales file"):
        read_runs([tmp_path / "absent.json"])
    folder = save_run(tmp_path / "run", RUN)
    with pytest.raises(GradInitError, match="the same run is given twice"):
        read_runs([folder, folder / scales.SCALES_FILE])


def test_gamma_is_that_of_the_signature():
    assert RUN.gamma == 1000.0
    assert BARE.gamma is None
    assert replace(BARE, scales=replace(LEARNED, signature="no fields")).gamma is None


# ---- What is drawn.


def test_lines_are_kinds_of_weights_over_the_layers_of_a_stack():
    found = lines_of(
        [
            ("encoder.layers.0.fc1.weight", 1.0),
            ("encoder.layers.1.fc1.weight", None),
            ("encoder.layers.2.fc1.weight", 3.0),
            ("encoder.layers.2.fc1.bias", 3.0),
            ("decoder.layers.0.fc1.weight", 4.0),
            ("models.de-en.decoder.layers.0.self_attn", 5.0),
            ("embed.weight", 6.0),
            ("3.weight", 7.0),
        ]
    )
    assert found == [
        Line("encoder.layers", "fc1.weight", ((0, 1.0), (2, 3.0))),
        Line("decoder.layers", "fc1.weight", ((0, 4.0),)),
        Line("models.de-en.decoder.layers", "self_attn", ((0, 5.0),)),
    ]


def curves(axes) -> dict[str, list[list[float]]]:
    return {
        str(line.get_label()): [list(line.get_xdata()), list(line.get_ydata())]
        for line in axes.lines
    }


def test_scales_are_drawn_by_layer_for_each_stack_and_run():
    figure = report_figures.scales_over_depth([RUN, BARE])
    assert len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes] == ["first", "bare", "", ""]
    for axes in figure.axes:
        assert curves(axes) == {
            "self_attn.q_proj.weight": [[0, 1, 2], [1.5, 1.25, 1.0]],
            "fc1.weight": [[0, 1, 2], [1.5, 1.25, 1.0]],
        }
        assert axes.get_yscale() == "log"


def test_norms_and_shares_are_drawn_before_and_after():
    axes = report_figures.norms_over_depth([RUN, BARE]).axes[0]
    dashed, solid = (
        [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == style]
        for style in ("--", "-")
    )
    assert dashed == [[4.0, 4.0, 4.0]] * 2
    assert solid == [[6.0, 5.0, 4.0]] * 2
    (axes,) = report_figures.shares_over_depth([RUN]).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.3] * 3, [0.0, 0.01, 0.02]]
    # One of them is zero.
    assert axes.get_yscale() == "symlog"


def test_iterations_are_drawn_with_gamma():
    losses, norms = report_figures.iterations([RUN, BARE]).axes
    assert curves(losses) == {
        "before the trial step": [[1, 2, 3], [9.5, 9.25, 9.0]],
        "after it, on the other batch": [[2, 3], [8.125, 7.5]],
    }
    drawn = curves(norms)
    assert drawn["objective iteration"] == [[2, 3], [900.0, 800.0]]
    assert drawn["constraint iteration"] == [[1], [2000.0]]
    assert set(drawn["gamma = 1000"][1]) == {1000.0}


def test_figures_without_data_are_left_out():
    assert report_figures.norms_over_depth([BARE]) is None
    assert report_figures.shares_over_depth([BARE]) is None
    assert report_figures.iterations([BARE]) is None
    flat = Scales((BlockScale("weight", (1,), 2.0, "learned"),), "gamma:off")
    assert report_figures.scales_over_depth([Run("flat", flat, None)]) is None


def test_dollar_signs_are_no_formulas():
    run = replace(RUN, label="$x$_{2} $")
    svg = report_figures.render(lambda: report_figures.iterations([run]), "iterations", "svg")
    assert b"$x$_{2} $" in svg


# ---- The page.


@pytest.fixture(scope="module")
def text() -> str:
    return report.page([RUN, BARE], "the command")


def test_the_page_needs_nothing_beside_it(text):
    assert text.count("<svg") == 4
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
    run = Run(name, Scales(blocks, f"seed:{name}", HISTORY), None)
    text = report.page([run], name)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 5


def test_the_summary_has_scales_iterations_and_losses(text):
    text = re.sub(r"\s+", " ", text).replace("> <", "><")
    for row in (
        "<th>tensors with a learned scale</th><td>19 of 19</td><td>18 of 18</td>",
        "<th>smallest of these scales</th><td>0.25 (embed.weight)</td><td>1 (",
        "<th>iterations</th><td>3, 1 of them for the constraint</td><td>not recorded</td>",
        "<th>loss before the trial step, first to last</th><td>9.500 to 9.000</td><td></td>",
        "<th>loss after it</th><td>8.125 to 7.500</td><td></td>",
    ):
        assert row in text


def test_settings_in_which_runs_differ_come_first():
    rows = report.settings_rows([RUN, BARE])
    assert [(row.name, row.values, row.differs) for row in rows] == [
        ("gamma", ("1000", "off"), True),
        ("seed", ("1", "2"), True),
        ("gradinit", ("0", "0"), False),
    ]


def test_colours_say_which_way_and_how_far():
    red, blue = report.colour_of(2.0), report.colour_of(0.5)
    assert red.startswith("rgba(220, 60, 40,")
    assert blue.startswith("rgba(50, 100, 230,")
    strengths = [float(report.colour_of(s).split(", ")[3][:-1]) for s in (1, 0.5, 0.1, 0.01, 0)]
    assert strengths[0] == 0
    assert strengths == sorted(strengths)
    assert strengths[-1] == strengths[-2] == 0.7


# ---- The program.


def test_the_program_writes_page_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run", RUN)
    assert command.main(["report", "run", "--png", "pictures"]) == 0
    names = ["scales", "iterations", "shares", "norms"]
    written = ["report.html", *(f"pictures/{name}.png" for name in names)]
    assert capsys.readouterr().out.split() == written
    assert "fairseq-gradinit report run --png pictures" in (tmp_path / "report.html").read_text()
    for path in written[1:]:
        assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["absent"], "cannot read the scales file absent"),
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
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_legible_in_light_and_dark(page, tmp_path, dark):
    shot = tmp_path / "shot.png"
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    browse(
        tmp_path / "profile",
        *scheme,
        "--window-size=1300,2000",
        f"--screenshot={shot}",
        page.as_uri(),
    )
    seen = brightness(shot)
    ground = np.median(seen)
    assert (ground < 0.2) if dark else (ground > 0.9)
    # Text and lines stand out everywhere: in tables as in figures.
    for band in np.array_split(seen, 10):
        assert np.abs(band - ground).max() > 0.5


@pytest.mark.slow
def test_the_page_can_be_printed(page, tmp_path):
    paper = tmp_path / "paper.pdf"
    browse(tmp_path / "profile", f"--print-to-pdf={paper}", "--no-pdf-header-footer", page.as_uri())
    content = paper.read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type /Page\b", content)) >= 2
