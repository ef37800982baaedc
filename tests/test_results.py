"""Records of runs, and the tables and heat maps that are made of them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import heat_map
import pytest
import torch
from heat_map import Panel, Point

from fairseq_gradinit.cli import command
from fairseq_gradinit.errors import GradInitError, needs_plot
from fairseq_gradinit.results import circumstances, tables
from fairseq_gradinit.results import records as results
from fairseq_gradinit.results.records import RunRecord, Settings, append_run, read_runs
from fairseq_gradinit.results.tables import Published
from fairseq_gradinit.scales import diff

MACHINE = circumstances.Circumstances(
    date="2026-11-23T10:00:00+00:00",
    git_revision="0123456789",
    git_dirty=False,
    python="3.11.7",
    torch="2.13.0",
    fairseq="ve-fairseq 0.12.3",
    cpu="CPU",
    cores=2,
    gpu=None,
    gpus=0,
    workers=1,
)
RUN = RunRecord(
    recipe="multi30k/gradinit-adam",
    title="GradInit, Adam",
    corpus="multi30k",
    corpus_digest="d1",
    plateau=9.5,
    settings=Settings(
        model="4+4 layers",
        optimizer="adam",
        optimizer_settings="(0.9, 0.98)",
        lr=2e-3,
        warmup=0,
        updates=2000,
        tokens_per_batch=1000,
        options=("--gradinit",),
    ),
    seed=1,
    commands=("fairseq-train multi30k",),
    circumstances=MACHINE,
    status="finished",
    reason=None,
    seconds=100.0,
    gradinit_seconds=10.0,
    seconds_per_update=0.05,
    tokens_per_second=2000.0,
    valid=((1000, 5.0), (2000, 4.0)),
    training=((2000, None),),
    valid_loss=4.0,
    scores=(results.TestScores("test", 30.0, None, 50.0, ("BLEU|1", "chrF2|1")),),
    comparison=results.Comparison("multi30k/default-adam", 0.5, 0.01, "paired|1"),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "runs.jsonl"


def test_records_come_back_as_they_were(file) -> None:
    bare = replace(RUN, seed=2, status="diverged", reason="it did", valid_loss=None, scores=())
    bare = replace(bare, seconds=None, comparison=None, circumstances=replace(MACHINE, gpu="GPU"))
    for run in (RUN, bare):
        append_run(file, run)
    assert read_runs([file]) == [RUN, bare]
    assert file.read_bytes().count(b"\n") == 2


def test_a_loss_that_is_not_finite_becomes_null(file) -> None:
    valid = results.curve([(1, math.nan), (2, math.inf), (3, 4.5)])
    append_run(file, replace(RUN, valid=valid))
    assert json.loads(file.read_text())["valid"] == [[1, None], [2, None], [3, 4.5]]


def test_a_later_run_replaces_an_earlier_one_that_is_alike(tmp_path) -> None:
    first, second = tmp_path / "a" / "1.jsonl", tmp_path / "a" / "2.jsonl"
    others = [replace(RUN, seed=2), replace(RUN, settings=replace(RUN.settings, options=()))]
    for run in (replace(RUN, valid_loss=8.0), *others):
        append_run(first, run)
    append_run(second, replace(RUN, title="Renamed", valid_loss=4.5))
    found = read_runs([first, second])
    assert found == [replace(RUN, title="Renamed", valid_loss=4.5), *others]


def test_lines_of_several_writers_stay_whole(file) -> None:
    runs = [replace(RUN, seed=seed, title="x" * 20_000) for seed in range(100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda run: append_run(file, run), runs))
    assert sorted(read_runs([file]), key=lambda run: run.seed) == runs


def test_a_torn_last_line_is_left_out_and_removed(file, caplog) -> None:
    append_run(file, RUN)
    with file.open("a") as end:
        end.write(json.dumps(asdict(RUN))[:-1])
    assert read_runs([file]) == [RUN]
    append_run(file, replace(RUN, seed=9))
    assert [run.seed for run in read_runs([file])] == [1, 9]
    assert "was not written to its end: removed" in caplog.text


def test_a_damaged_line_is_named(file) -> None:
    append_run(file, RUN)
    with file.open("a") as end:
        end.write(json.dumps({**asdict(RUN), "plateau": "high"}) + "\n")
    sentence = (
        r"^line 2 of .*runs\.jsonl is not a record of a run \(.*'high' is not a number\): mend"
    )
    with pytest.raises(GradInitError, match=sentence):
        read_runs([file])


# ---- Circumstances.


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_circumstances_are_those_of_machine_and_repository(tmp_path) -> None:
    outside = circumstances.current_circumstances(tmp_path)
    assert (outside.git_revision, outside.git_dirty) == (None, False)
    assert (outside.torch, outside.gpus) == (torch.__version__, torch.cuda.device_count())
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "code")
    (tmp_path / "results.jsonl").write_text("untracked")
    clean = circumstances.current_circumstances(tmp_path, workers=3)
    assert clean.git_revision == git(tmp_path, "rev-parse", "HEAD")
    assert (clean.git_dirty, clean.workers) == (False, 3)
    (tmp_path / "code.py").write_text("2")
    assert circumstances.current_circumstances(tmp_path).git_dirty


def test_a_source_tells_machines_days_versions_and_revisions() -> None:
    gpus = replace(
        MACHINE, gpu="GPU", gpus=8, workers=8, date="2026-11-25T10:00:00+00:00", torch="2.14"
    )
    dirty = replace(MACHINE, git_revision="abcdefghi", git_dirty=True)
    outside = replace(MACHINE, git_revision=None)
    assert circumstances.source("c", "4 runs", [MACHINE, gpus, dirty, outside]) == (
        "`c`: 4 runs on 8 x GPU, 8 workers and CPU, 2 cores, 2026-11-23 to 2026-11-25, "
        "torch 2.13.0 and 2.14, ve-fairseq 0.12.3, "
        "revision 0123456 and abcdefg with changes and unknown"
    )


# ---- Tables.

BASELINE = replace(
    RUN,
    recipe="multi30k/default-adam",
    title="default, Adam",
    settings=replace(RUN.settings, warmup=500, options=()),
    gradinit_seconds=None,
    comparison=None,
)
FIGURE = Published(
    "multi30k", RUN.recipe, "BLEU", 34.25, "A. Author, https://example.org/a.pdf, Table 4."
)


def with_settings(run: RunRecord, **changes: object) -> RunRecord:
    return replace(run, settings=replace(run.settings, **changes))


def with_bleu(run: RunRecord, bleu: float, **changes: object) -> RunRecord:
    return replace(run, scores=(replace(run.scores[0], bleu=bleu, **changes),))


def report(runs: Sequence[RunRecord], *published: Published) -> str:
    return tables.report(runs, published, "the command")


def rows(runs: Sequence[RunRecord], *published: Published) -> list[dict[str, str]]:
    """The rows of the only table, without what stands around them."""
    lines = [line for line in report(runs, *published).splitlines() if line.startswith("|")]
    header, _, *found = [line[2:-2].split(" | ") for line in lines]
    return [dict(zip(header, cells, strict=True)) for cells in found]


def diverged(run: RunRecord) -> RunRecord:
    return replace(
        run, status="diverged", reason="it did", valid_loss=None, scores=(), comparison=None
    )


def test_a_table_by_hand() -> None:
    baselines = [
        replace(with_bleu(BASELINE, 29.0), valid_loss=4.5),
        replace(with_bleu(BASELINE, 31.0), valid_loss=4.7, seed=2, tokens_per_second=2100.0),
    ]
    # 10 s and 6 s in updates of 0.05 s are 200 and 120 updates.
    runs = [
        RUN,
        replace(RUN, seed=2, valid_loss=4.2, gradinit_seconds=6.0),
        diverged(replace(RUN, seed=3, gradinit_seconds=8.0)),
    ]
    heading, _, header, _, default, own = report([*baselines, *runs], FIGURE).splitlines()[:6]
    assert heading == "### multi30k, 4+4 layers"
    assert header == (
        "| start | optimizer | peak lr | warmup updates | seeds | validation loss"
        " | BLEU (sacrebleu) | chrF2 | cost of GradInit, updates | tokens/s | p-value | published |"
    )
    assert default == (
        "| default, Adam | adam (0.9, 0.98) | 0.002 | 500 | 2 | 4.60 ± 0.14 | 30.0 ± 1.4"
        " | 50.0 ± 0.0 |  | 2050 ± 71 |  |  |"
    )
    assert own == (
        "| GradInit, Adam | adam (0.9, 0.98) | 0.002 | 0 | 3, 1 diverged | 4.10 ± 0.14 | 30.0 ± 0.0"
        " | 50.0 ± 0.0 | 160 ± 40 | 2000 ± 0 | 2 of 2 better | BLEU 34.25 (1) |"
    )


def test_each_test_set_has_its_columns() -> None:
    first = replace(RUN.scores[0], name="newstest2013", bleu=26.0, tokenised_bleu=31.26)
    second = replace(RUN.scores[0], name="newstest2014", bleu=27.0)
    (row,) = rows([replace(RUN, scores=(first, second))])
    assert row["BLEU (sacrebleu), newstest2013"] == "26.0"
    assert row["tokenised BLEU, newstest2013"] == "31.3"
    assert row["BLEU (sacrebleu), newstest2014"] == "27.0"
    # Columns without any value are left out.
    assert "tokenised BLEU, newstest2014" not in row


@pytest.mark.parametrize(
    ("found", "cell"),
    [
        ([(-0.8, 0.0123)], "0.012 (-0.8 BLEU)"),
        ([(0.8, 0.01), (-0.5, 0.049), (-0.9, 0.05)], "1 of 3 better, 1 of 3 worse"),
        ([(0.8, 0.06), (-0.5, 0.5)], "none of 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_p_values(found, cell) -> None:
    runs = [
        replace(RUN, seed=i, comparison=replace(RUN.comparison, bleu_difference=d, p_value=p))
        for i, (d, p) in enumerate(found)
    ]
    assert rows(runs)[0]["p-value"] == cell


def test_a_table_for_each_corpus_and_model() -> None:
    runs = [RUN, with_settings(RUN, model="12+12 layers"), replace(RUN, corpus_digest="fedcba987")]
    headings = [line for line in report(runs).splitlines() if line.startswith("#")]
    assert headings == [
        *("### multi30k (d1), 4+4 layers", "### multi30k, 12+12 layers"),
        "### multi30k (fedcba9), 4+4 layers",
    ]


def test_rows_that_differ_in_other_settings_say_in_which() -> None:
    dropout = with_settings(RUN, options=("--gradinit", "--dropout 0.3"))
    found = rows([RUN, dropout, with_settings(RUN, updates=4000)])
    cells = [(row["updates"], row["options"]) for row in found]
    assert cells == [("2000", ""), ("2000", "`--dropout 0.3`"), ("4000", "")]
    assert "tokens a batch" not in found[0]
    sizes = rows([RUN, with_settings(RUN, tokens_per_batch=8000)])
    assert [row["tokens a batch"] for row in sizes] == ["1000", "8000"]
    # Recipes differ in options, and their names say it.
    assert "options" not in rows([BASELINE, RUN])[0]
    found = rows([RUN, replace(RUN, recipe="multi30k/again")])
    assert [row["start"] for row in found] == [
        "GradInit, Adam (multi30k/gradinit-adam)",
        "GradInit, Adam (multi30k/again)",
    ]


def test_below_a_table_stands_where_it_comes_from() -> None:
    *_, reading, source = filter(None, report([BASELINE, RUN]).splitlines())
    assert reading == (
        "2,000 updates of 1,000 tokens at most. Mean ± standard deviation over the seeds that did "
        "not diverge; validation loss in base 2, the unigram plateau is 9.50. p-value: of the "
        "difference in BLEU from multi30k/default-adam; of several seeds, how many have p < 0.05. "
        "Signatures: `BLEU|1`, `chrF2|1`, `paired|1`."
    )
    assert source.startswith("`the command`: 2 runs on CPU, 2 cores, 2026-11-23, torch 2.13.0, ")


def test_published_figures_stand_with_their_source() -> None:
    figures = (
        FIGURE,
        replace(FIGURE, metric="tokenised BLEU", value=35.0, source="(https://example.org/b)"),
        replace(FIGURE, corpus="other", source="https://example.org/of-another-corpus"),
    )
    default, own = rows([BASELINE, RUN], *figures)
    assert default["published"] == ""
    assert own["published"] == "BLEU 34.25 (1), tokenised BLEU 35 (2)"
    lines = report([BASELINE, RUN], *figures).splitlines()
    assert [line for line in lines if line.startswith("(")] == [
        "(1) A. Author, <https://example.org/a.pdf>, Table 4.",
        "(2) (<https://example.org/b>)",
    ]


# ---- Heat maps.


def points(losses: dict[tuple[str, float], Sequence[float | None]]) -> list[Point]:
    return [Point(row, lr, loss, 9.5) for (row, lr), cell in losses.items() for loss in cell]


def test_a_picture_shows_each_cell_in_its_place() -> None:
    losses = {
        ("0.9", 1e-3): [8.0, 8.1],
        ("0.98", 1e-3): [None],
        ("0.98", 2e-3): [4.0, None, 5.0],
    }
    panels = [Panel("one", "beta2", points(losses)), Panel("two", "beta2", points(losses)[::-1])]
    first, second, _ = heat_map.draw(panels).axes
    assert [[text.get_text() for text in axes.texts] for axes in (first, second)] == [
        ["8.05", "", "diverged", "4.50\n1 of 3\ndiverged"],
        ["diverged", "4.50\n1 of 3\ndiverged", "8.05", ""],
    ]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0.9", "0.98"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["0.001", "0.002"]
    # A cell trains if all its runs do.
    assert first.get_title() == "one\n0 of 3 train (0%)"
    norm = first.images[0].norm
    assert norm is second.images[0].norm
    assert (norm.vmin, norm.vmax) == (4.0, 9.5)


def test_a_panel_for_each_recipe_and_its_settings() -> None:
    runs = [
        with_settings(run, lr=lr, optimizer_settings=f"(0.9, {beta2})")
        for run in (BASELINE, RUN, diverged(replace(RUN, seed=2)), with_settings(RUN, warmup=50))
        for beta2 in (0.999, 0.98)
        for lr in (2e-3, 1e-3)
    ]
    panels = heat_map.panels_of(runs)
    recipes = ["default-adam, warmup 500", "gradinit-adam, warmup 0", "gradinit-adam, warmup 50"]
    assert [panel.title for panel in panels] == [f"multi30k/{recipe}" for recipe in recipes]
    own = panels[1]
    assert (own.rows, own.rates) == (["(0.9, 0.98)", "(0.9, 0.999)"], [1e-3, 2e-3])
    assert [point.loss for point in own.cells["(0.9, 0.98)", 1e-3]] == [4.0, None]
    assert (panels[0].share, own.share) == ("4 of 4 train (100%)", "0 of 4 train (0%)")


# ---- The program.


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """The folder that the program runs in, with runs in results.jsonl."""
    for run in (BASELINE, RUN):
        append_run(tmp_path / "results.jsonl", run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_program_prints_the_tables(kept, capsys) -> None:
    (kept / "published.json").write_text(json.dumps([asdict(FIGURE)]))
    words = ["table", str(kept / "results.jsonl"), "--published", "published.json"]
    assert command.main(words) == 0
    # No path of this machine.
    line = "fairseq-gradinit table results.jsonl --published published.json"
    assert capsys.readouterr().out == tables.report([BASELINE, RUN], [FIGURE], line)


def test_the_program_draws_the_heat_map(kept, capsys) -> None:
    assert heat_map.main(["results.jsonl", "--out", "sweep.png"]) == 0
    assert (kept / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert heat_map.main(["results.jsonl", "--out", "no/a.png"]) == 1
    assert "no/a.png" in capsys.readouterr().err


def test_a_defect_does_not_end_as_a_finding(monkeypatch, capsys) -> None:
    def broken(*_):
        raise KeyError("of ours")

    monkeypatch.setattr(diff, "scales_file", broken)
    assert command.main(["diff", "a", "b"]) == 2
    assert "KeyError: 'of ours'" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.SUBCOMMANDS)
def test_each_subcommand_explains_itself(capsys, name) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main([name, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: fairseq-gradinit {name} [")
    assert "\n\noptions:\n" in printed


def test_a_missing_matplotlib_is_answered_with_what_to_install() -> None:
    expected = (
        "matplotlib, which reports need, is not installed: run "
        "`pip install 'fairseq-gradinit.plot.'`"
    )
    with pytest.raises(GradInitError, match=expected), needs_plot("reports"):
        raise ModuleNotFoundError(name="matplotlib")


def test_the_package_is_the_program_and_tables_need_neither_fairseq_nor_torch(kept) -> None:
    words = [sys.executable, "-X", "importtime", "-m", "fairseq_gradinit", "table", "results.jsonl"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("### multi30k, 4+4 layers\n")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fairseq_gradinit.results.tables" in imported
    assert not imported & {"fairseq", "torch", "numpy", "matplotlib"}
