"""The training studies: what their runs are, which are kept, and what is shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import training
import training_report as shown
from cases import Case, RunError
from conftest import binarise, write_corpus, write_manifest
from corpora import Corpus
from runner import Run
from test_results import MACHINE
from training import DEFAULT, GRADINIT, MULTI30K, QUICKSTART, STUDIES, WARMUP, adam, case, kept_runs

from fairseq_gradinit import results
from fairseq_gradinit.results import RunRecord, read_runs

SETUP = replace(MULTI30K, updates=100)
CASE = case(SETUP, DEFAULT)


def record(case: Case = CASE, valid_loss: float | None = 5.0, **changes: object) -> RunRecord:
    """A run of 100 updates whose loss falls by one with each validation; None has diverged."""
    end = 9.0 if valid_loss is None else valid_loss
    usual = RunRecord(
        recipe=case.recipe,
        title=case.title,
        corpus="multi30k-de-en",
        corpus_digest="d1",
        plateau=9.8,
        settings=case.settings,
        seed=case.seed,
        commands=("fairseq-train ...",),
        circumstances=MACHINE,
        status="diverged" if valid_loss is None else "finished",
        reason="FloatingPointError" if valid_loss is None else None,
        seconds=60.0,
        gradinit_seconds=None,
        seconds_per_update=None,
        tokens_per_second=None,
        valid=tuple((update, end + (100 - update) / 10) for update in range(10, 101, 10)),
        training=(),
        valid_loss=valid_loss,
        scores=(),
        comparison=None,
    )
    return replace(usual, **changes)


# ---- What is shown.


def test_rows_are_means_over_seeds() -> None:
    scores = (results.TestScores("test", 20.0, None, 40.0, ()),)
    # 30 s in updates of 0.25 s each.
    cost = {"gradinit_seconds": 30.0, "seconds_per_update": 0.25}
    runs = [
        record(valid_loss=5.0),
        record(replace(CASE, seed=2), valid_loss=6.0),
        record(replace(CASE, seed=3), valid_loss=None),
        record(case(SETUP, GRADINIT), 4.5, scores=scores, **cost),
    ]
    (table,) = shown.settings_tables(runs)
    default, other = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert default["corpus"] == "multi30k, 4+4 layers, d 128"
    assert default["optimizer"] == "adam beta2 0.98"
    assert default["seeds"] == "3, 1 diverged"
    assert default["loss at 100%"] == "5.50 ± 0.71"
    assert default["loss at 50%"] == "10.50 ± 0.71"
    assert default["BLEU"] == default["cost of GradInit, updates"] == ""
    assert other["start"] == "GradInit, no warmup"
    assert (other["loss at 10%"], other["loss at 100%"]) == ("13.50", "4.50")
    assert (other["BLEU"], other["chrF2"]) == ("20.0", "40.0")
    assert other["cost of GradInit, updates"] == "120"
    assert "BLEU" not in shown.settings_tables(runs[:3])[0].header


def test_share_table_counts_the_runs_that_train() -> None:
    losses = {(0.9, 1e-3): 5.0, (0.9, 2e-3): None, (0.98, 1e-3): 9.7, (0.98, 2e-3): 8.0}
    runs = [
        record(case(SETUP, DEFAULT, lr=lr, optimizer=adam(beta2)), loss)
        for (beta2, lr), loss in losses.items()
    ]
    share, grid = shown.share_tables(runs, training.BETAS)
    assert "at most 8.30 at the end, 1.5 bits less than the unigram plateau of 9.80" in share.title
    assert share.rows == [["default, no warmup", "2 of 4 train (50%)", "5.00"]]
    assert list(grid.header) == ["optimizer \\ peak lr", "0.001", "0.002"]
    assert grid.rows == [
        ["adam beta2 0.9", "**5.00**", "diverged"],
        ["adam beta2 0.98", "9.70", "8.00"],
    ]


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_every_study_shows_partial_results(study, tmp_path) -> None:
    losses = (None, 9.0, 5.5, 11.0)
    some = [record(case, losses[i % 4]) for i, case in enumerate(study.cases[::2])]
    for part in (some[:1], some):
        training.show(study, part, tmp_path)
        assert (tmp_path / f"training-{study.name}.png").stat().st_size > 5_000


@pytest.mark.parametrize("study", STUDIES.values(), ids=lambda study: study.name)
def test_kept_records_are_of_the_studies_as_they_are(study) -> None:
    file = training.RESULTS / f"training-{study.name}.jsonl"
    runs = read_runs([file])
    assert kept_runs(study.cases, runs, {})
    assert len(runs) == len(file.read_text().splitlines())


# ---- The studies.


def test_studies_hold_each_case_once() -> None:
    for study in STUDIES.values():
        assert len(set(study.cases)) == len(study.cases) > 0
        keys = {(case.recipe, case.settings, case.seed) for case in study.cases}
        assert len(keys) == len(study.cases)


def test_arms_differ_only_in_how_they_start() -> None:
    default, warmup, gradinit = (case(MULTI30K, arm).options for arm in (DEFAULT, WARMUP, GRADINIT))
    different = [words for words in zip(default, warmup, strict=True) if len(set(words)) > 1]
    assert different == [("0", str(MULTI30K.warmup))]
    assert tuple(word for word in gradinit if word != "--gradinit") == default


def test_seeds_come_one_after_the_other() -> None:
    other = replace(case(SETUP, DEFAULT, lr=1.0), seed=7)
    assert training.with_seeds((CASE, other), (4, 5)) == tuple(
        replace(c, seed=seed) for seed in (4, 5) for c in (CASE, other)
    )


def test_only_the_same_case_on_the_same_corpus_is_kept() -> None:
    old = record(corpus_digest="d0", valid_loss=1.0)
    runs = [
        *(old, record(title="another", valid_loss=2.0), record(replace(CASE, seed=9), 4.0)),
        *(record(case(SETUP, DEFAULT, lr=0.5)), record(case(MULTI30K, DEFAULT))),
    ]
    found = kept_runs([CASE], runs, {})
    assert [(r.seed, r.valid_loss) for r in found] == [(1, 2.0), (9, 4.0)]
    assert found[0].title == DEFAULT.title
    given = {"multi30k": Corpus(Path(), "d0", 9.8)}
    assert [r.valid_loss for r in kept_runs([CASE], runs, given)] == [1.0]


# ---- Running.


def conduct(tmp_path: Path, *arguments: str) -> int:
    folders = ("--results", str(tmp_path / "results"), "--work", str(tmp_path / "work"))
    return training.main([*arguments, *folders])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus where `prepare.py` would have put it."""
    folder = tmp_path_factory.mktemp("prepared")
    for kind in ("text", "subwords"):
        (folder / kind).mkdir()
        write_corpus(folder / kind, {"train": 200, "valid": 20, "test": 11})
    text = folder / "text"
    binarise(
        folder / "data-bin",
        *("-s", "de", "-t", "en", "--joined-dictionary", "--trainpref", str(text / "train")),
        *("--validpref", str(text / "valid"), "--testpref", str(text / "test")),
    )
    write_manifest(folder, "1")
    return folder


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that are carried out, with no program; one of learning rate 7 fails."""
    ran: list[Run] = []

    def carry_out(run: Run) -> RunRecord:
        ran.append(run)
        if run.case.settings.lr == 7:
            raise RunError("it broke (its whole output: x.log)")
        digest = Corpus.read(Path(run.case.corpus)).digest
        loss = None if run.case.settings.lr > 1 else 5.0
        run.checkpoints.mkdir(parents=True)
        return record(run.case, loss, corpus_digest=digest)

    monkeypatch.setattr(Run, "carry_out", carry_out)
    return ran


def test_what_is_kept_is_not_run_again(tmp_path, prepared, ran, capsys) -> None:
    study = ("sgd", "--corpus", f"multi30k={prepared}")
    assert conduct(tmp_path, *study, "--only", "lr 2 ") == 0
    assert len(ran) == 3
    assert conduct(tmp_path, *study, "--workers", "3") == 0
    cases = len(STUDIES["sgd"].cases)
    assert len({run.folder for run in ran}) == len(ran) == cases
    assert not any(run.checkpoints.exists() for run in ran)
    assert conduct(tmp_path, *study, "--seeds", "1", "2", "--only", "gradinit") == 0
    assert [run.case.seed for run in ran[cases:]] == [2] * len(training.SGD_RATES)
    count = len(ran)
    capsys.readouterr()
    assert conduct(tmp_path, "sgd", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == cases
    assert all(line.endswith(", kept") for line in lines)
    write_manifest(prepared, "2")
    assert conduct(tmp_path, *study, "--only", "lr 2 ") == 0
    assert len(ran) == count + 3


def test_a_failure_stops_what_has_not_begun(tmp_path, prepared, ran) -> None:
    cases = [replace(case(SETUP, DEFAULT, lr=lr), corpus=str(prepared)) for lr in (1.0, 7.0, 0.5)]
    runs = [Run(case, tmp_path / str(i)) for i, case in enumerate(cases)]
    with pytest.raises(RunError, match=r"multi30k default lr 7 .*: it broke .*x\.log"):
        training.run_all(runs, tmp_path / "runs.jsonl", workers=1)
    assert ran == runs[:2]
    assert [kept.settings.lr for kept in read_runs([tmp_path / "runs.jsonl"])] == [1.0]


def test_scales_of_another_corpus_need_it(tmp_path, prepared) -> None:
    other = case(QUICKSTART, GRADINIT)
    own = case(SETUP, GRADINIT, scales_of=other)
    assert training.corpora_of(own) == {"multi30k", "quickstart"}
    corpora = {name: Corpus(tmp_path / name, "d1", 9.8) for name in training.corpora_of(own)}
    run = training.prepared(own, corpora, tmp_path)
    assert run.case.corpus == f"{tmp_path}/multi30k"
    assert run.case.scales_of == replace(other, corpus=f"{tmp_path}/quickstart")


def test_progress_estimates_from_what_is_done() -> None:
    assert training.progress(2, 6, 30.0) == "2 of 6 after 0:00:30, about 0:01:00 to go"
    assert training.progress(6, 6, 30.0) == "6 of 6 after 0:00:30"


# ---- With fairseq.


def tiny(setup: training.Setup, **changes: object) -> training.Setup:
    model = training.transformer(layers=1, width=16, ffn=32, heads=2)
    return replace(setup, model=model, updates=4, max_tokens=200, **changes)


def study_of(name: str, cases: Sequence[Case]) -> training.Study:
    return replace(STUDIES[name], cases=tuple(cases))


@pytest.mark.slow
def test_a_tiny_study(tmp_path, prepared, capsys, monkeypatch) -> None:
    arm = replace(GRADINIT, options=("--gradinit", "--gradinit-iterations", "2"))
    trained = case(tiny(QUICKSTART), arm, scored=True)
    hopeless = case(tiny(QUICKSTART), DEFAULT, lr=1e30, optimizer=training.SGD)
    monkeypatch.setitem(STUDIES, "arms", study_of("arms", [trained, hopeless]))
    assert conduct(tmp_path, "arms", "--corpus", f"quickstart={prepared}") == 0
    kept, diverged = read_runs([tmp_path / "results" / "training-arms.jsonl"])
    assert kept.status == "finished"
    assert [update for update, _ in kept.valid] == [1, 2, 3, 4]
    assert [update for update, _ in kept.training] == [1, 2, 3, 4]
    assert kept.valid_loss == kept.valid[-1][1] < kept.valid[0][1]
    assert kept.gradinit_seconds is not None  # 0.0 on a fast machine
    assert kept.seconds_per_update > 0.0
    assert "nrefs:1" in kept.scores[0].signatures[0]
    assert kept.corpus_digest == Corpus.read(prepared).digest
    assert (diverged.status, diverged.valid_loss) == ("diverged", None)
    assert diverged.reason == "FloatingPointError: gradients are Nan/Inf"
    assert not list((tmp_path / "work").glob("*/checkpoints"))
    printed = capsys.readouterr().out
    assert "| GradInit, no warmup | 0 | 1 |" in printed
    assert conduct(tmp_path, "arms", "--table") == 0
    assert capsys.readouterr().out == printed
    assert (tmp_path / "results" / "training-arms.png").stat().st_size > 10_000
