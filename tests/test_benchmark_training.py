"""The training studies: what their runs are, which are kept, and what is shown of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import training
import training_report as shown
from cases import Case
from conftest import binarise, write_corpus, write_manifest
from corpora import Corpus
from runner import Run
from training import DEFAULT, GRADINIT, MULTI30K, STUDIES, WARMUP, Study, adam, case, kept_runs

from fairseq_gradinit import results
from fairseq_gradinit.results import RunRecord, append_run, read_runs

SETUP = replace(MULTI30K, updates=100)
CASE = case(SETUP, DEFAULT)
USUAL = read_runs([training.RESULTS / "training-arms.jsonl"])[0]


def record(case: Case = CASE, valid_loss: float | None = 5.0, **changes: object) -> RunRecord:
    """A run of 100 updates whose loss falls by one with each validation; None has diverged."""
    end = 9.0 if valid_loss is None else valid_loss
    run = replace(
        USUAL,
        **{"recipe": case.recipe, "title": case.title, "settings": case.settings},
        **{"seed": case.seed, "corpus_digest": "d1", "plateau": 9.8, "scores": ()},
        status="diverged" if valid_loss is None else "finished",
        valid=tuple((update, end + (100 - update) / 10) for update in range(10, 101, 10)),
        valid_loss=valid_loss,
        gradinit_seconds=None,
    )
    return replace(run, **changes)


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
    assert (default["loss at 50%"], default["loss at 100%"]) == ("10.50 ± 0.71", "5.50 ± 0.71")
    assert default["BLEU"] == default["cost of GradInit, updates"] == ""
    assert (other["BLEU"], other["chrF2"]) == ("20.0", "40.0")
    assert other["cost of GradInit, updates"] == "120"
    assert "BLEU" not in shown.settings_tables(runs[:3])[0].header


def test_share_table_counts_the_runs_that_train() -> None:
    losses = {(0.9, 1e-3): 5.0, (0.9, 2e-3): None, (0.98, 1e-3): 9.7, (0.98, 2e-3): 8.0}
    share, grid = shown.share_tables(
        [
            record(case(SETUP, DEFAULT, lr=lr, optimizer=adam(beta2)), loss)
            for (beta2, lr), loss in losses.items()
        ],
        training.BETAS,
    )
    assert share.rows == [["default, no warmup", "2 of 4 train (50%)", "5.00"]]
    assert grid.rows == [
        ["adam beta2 0.9", "**5.00**", "diverged"],
        ["adam beta2 0.98", "9.70", "8.00"],
    ]


@pytest.mark.parametrize("name", STUDIES)
def test_kept_records_are_of_the_study_and_parts_of_them_can_be_shown(name, tmp_path) -> None:
    study = STUDIES[name]
    file = training.RESULTS / f"training-{name}.jsonl"
    runs = kept_runs(study, file, {})
    assert len(runs) == len(file.read_text().splitlines()) > 0
    keys = {(run.recipe, run.settings, run.seed) for run in study.runs}
    assert len(keys) == len(study.runs)
    for part in (runs[:1], runs):
        assert study.tables(part)
        if study.picture:
            study.picture(part).savefig(tmp_path / "picture.png")


def test_arms_differ_only_in_how_they_start() -> None:
    default, warmup, gradinit = (case(MULTI30K, arm).options for arm in (DEFAULT, WARMUP, GRADINIT))
    different = [words for words in zip(default, warmup, strict=True) if len(set(words)) > 1]
    assert different == [("0", str(MULTI30K.warmup))]
    assert tuple(word for word in gradinit if word != "--gradinit") == default


def test_only_the_same_case_on_the_same_corpus_is_kept(tmp_path) -> None:
    file, study = tmp_path / "runs.jsonl", Study([CASE])
    for run in (
        *(record(corpus_digest="d0", valid_loss=1.0), record(title="another", valid_loss=2.0)),
        *(record(replace(CASE, seed=9), 4.0), record(case(SETUP, DEFAULT, lr=0.5))),
    ):
        append_run(file, run)
    found = kept_runs(study, file, {})
    assert [(r.seed, r.valid_loss) for r in found] == [(1, 2.0), (9, 4.0)]
    assert found[0].title == DEFAULT.title
    given = {"multi30k": Corpus(Path(), "d0", 9.8)}
    assert [r.valid_loss for r in kept_runs(study, file, given)] == [1.0]


def test_what_is_kept_or_lacks_a_corpus_is_not_run(tmp_path, monkeypatch) -> None:
    ran: list[Case] = []
    monkeypatch.setattr(Run, "carry_out", lambda run: ran.append(run.case) or record(run.case))
    corpora = {"multi30k": Corpus(tmp_path, "d1", 9.8)}
    training.run_missing(STUDIES["transfer"], tmp_path / "runs.jsonl", corpora)
    assert len(ran) == 6
    corpora["quickstart"] = Corpus(tmp_path / "other", "d1", 9.8)
    training.run_missing(STUDIES["transfer"], tmp_path / "runs.jsonl", corpora)
    places = [(run.corpus, run.scales_of.corpus) for run in ran[6:]]
    assert places == [(str(tmp_path), str(tmp_path / "other"))] * 2


@pytest.mark.slow
def test_a_tiny_study(tmp_path, capsys, monkeypatch) -> None:
    corpus, text = tmp_path / "corpus", tmp_path / "corpus" / "text"
    for folder in (text, corpus / "subwords"):
        folder.mkdir(parents=True)
        write_corpus(folder, {"train": 200, "valid": 20, "test": 11})
    binarise(
        corpus / "data-bin",
        *("-s", "de", "-t", "en", "--joined-dictionary", "--trainpref", str(text / "train")),
        *("--validpref", str(text / "valid"), "--testpref", str(text / "test")),
    )
    write_manifest(corpus, "1")
    setup = replace(MULTI30K, updates=4, **training.transformer(1, 16))
    learned = replace(GRADINIT, options=("--gradinit", "--gradinit-iterations", "2"))
    hopeless = case(setup, DEFAULT, lr=1e30, optimizer=training.SGD)
    study = Study([case(setup, learned, scored=True), hopeless])
    monkeypatch.setitem(STUDIES, "arms", study)
    monkeypatch.setattr(training, "RESULTS", tmp_path)
    monkeypatch.setattr(training, "WORK", tmp_path / "work")
    training.main(["arms", "--corpus", f"multi30k={corpus}"])
    kept, diverged = read_runs([tmp_path / "training-arms.jsonl"])
    assert kept.status == "finished"
    assert [update for update, _ in kept.valid] == [1, 2, 3, 4]
    assert kept.valid_loss == kept.valid[-1][1] < kept.valid[0][1]
    assert kept.seconds_per_update > 0.0
    assert "nrefs:1" in kept.scores[0].signatures[0]
    assert (diverged.status, diverged.valid_loss) == ("diverged", None)
    assert not list((tmp_path / "work").glob("*/checkpoints"))
    printed = capsys.readouterr().out
    assert "| GradInit, no warmup | 0 | 1 |" in printed
    training.main(["arms", "--table"])
    assert capsys.readouterr().out == printed
