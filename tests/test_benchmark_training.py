"""The training studies: what their runs are, which are kept, and what is shown of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import training
import training_report as shown
from conftest import ROOT, binarise, write_corpus, write_manifest
from training import DEFAULT, GRADINIT, MULTI30K, STUDIES, Study, case, kept_runs

from fairseq_gradinit.results import RunRecord, read_runs


def kept(name: str) -> list[RunRecord]:
    return kept_runs(STUDIES[name], training.RESULTS / f"training-{name}.jsonl", {})


def test_the_page_shows_the_kept_arms() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    (table,) = shown.settings_tables(kept("arms"))
    for row in table.rows:
        cells = dict(zip(table.header, row, strict=True))
        corpus, _, _ = cells["corpus"].partition(",")
        start, _, _ = cells["start"].partition(",")
        before = (corpus, cells["peak lr"], start, cells["warmup"], cells["seeds"])
        results = (cells["loss at 50%"], cells["loss at 100%"], cells["BLEU"], cells["chrF2"])
        cost = cells["cost of GradInit, updates"]
        assert f"| {' | '.join([*before, *results, cost])} |" in page


@pytest.mark.parametrize("name", STUDIES)
def test_kept_records_are_of_the_study_and_parts_of_them_can_be_shown(name, tmp_path) -> None:
    study = STUDIES[name]
    runs = kept(name)
    file = training.RESULTS / f"training-{name}.jsonl"
    assert len(runs) == len(file.read_text().splitlines()) > 0
    keys = {(run.recipe, run.settings, run.seed) for run in study.runs}
    assert len(keys) == len(study.runs)
    for part in (runs[:1], runs):
        assert study.tables(part)
        if study.picture:
            study.picture(part).savefig(tmp_path / "picture.png")


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
