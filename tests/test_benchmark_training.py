"""The training benchmark: it keeps what it ran, and shows what came of it."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import training
import training_report as shown
import training_runs
from conftest import ROOT, binarise, write_corpus, write_manifest
from fairseq_runs import unigram_plateau
from training import (
    ADAM,
    DEFAULT,
    GRADINIT,
    MULTI30K,
    QUICKSTART,
    STUDIES,
    WARMUP,
    adam,
    case,
    kept_runs,
)
from training_runs import Case, Corpus, Run, RunError, Runner, RunsFile, run_all

from fairseq_gradinit.errors import GradInitError

CASE = case(MULTI30K, DEFAULT, updates=100)


def run(case: Case = CASE, valid_loss: float | None = 5.0, **changes: object) -> Run:
    """A run of 100 updates whose loss falls by one with each validation; None has diverged."""
    end = 9.0 if valid_loss is None else valid_loss
    usual = Run(
        case,
        corpus_digest="d1",
        plateau=9.8,
        circumstances={
            **{"date": "2026-11-23T10:00:00+00:00", "git_revision": "0123456789"},
            **{"git_dirty": False, "python": "3.11.7", "torch": "2.13", "numpy": "2.4"},
            **{"cpu": "CPU", "cores": 2, "threads": 1, "gpu": None, "fairseq": "fairseq 1"},
        },
        commands=["fairseq-train ..."],
        status="diverged" if valid_loss is None else "finished",
        reason="FloatingPointError" if valid_loss is None else None,
        seconds=60.0,
        valid=[[update, end + (100 - update) / 10] for update in range(10, 101, 10)],
        training=[],
        valid_loss=valid_loss,
    )
    return replace(usual, **changes)


# ---- The arithmetic.


def test_plateau_by_hand() -> None:
    train = [["a", "a", "a"], []]  # with the ends of sentences: 3 a, 2 </s>
    valid = [["a", "unseen"]]  # a, <unk>, </s>
    # Six entries: <s>, <pad>, </s>, <unk>, a, b. e' = 0.1 / 5 = 0.02, and 0.88 is left for p.
    q = {"a": 0.88 * 0.6 + 0.02, "</s>": 0.88 * 0.4 + 0.02, **dict.fromkeys("1234", 0.02)}
    assert sum(q.values()) == pytest.approx(1.0)
    everywhere = sum(-math.log2(share) for share in q.values())
    right = (-math.log2(q["a"]) - math.log2(q["</s>"]) - math.log2(0.02)) / 3
    expected = 0.88 * right + 0.02 * everywhere
    assert unigram_plateau(train, valid, ["a", "b"]) == pytest.approx(expected)


def test_no_constant_prediction_beats_the_plateau_on_its_own_data() -> None:
    sentences = [["a", "b", "a"], ["c", "a"]]
    lowest = unigram_plateau(sentences, sentences, ["a", "b", "c"])
    others = [["a"], ["a", "b"]], [["a", "b", "c"]], [["a", "a", "b", "b", "c", "c"]]
    assert all(unigram_plateau(other, sentences, ["a", "b", "c"]) > lowest for other in others)


@pytest.mark.slow
def test_plateau_is_the_same_in_every_process() -> None:
    """Hashes of strings, and so the order of sets, differ from process to process."""
    program = """
from fairseq_runs import unigram_plateau
words = [str(n) for n in range(3000)]
print(unigram_plateau([words[:n] for n in range(0, 1000, 50)], [words[:70]], words))
"""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("recipes", "data-prep"))
    plateaus = {
        subprocess.check_output(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": str(seed)},
        )
        for seed in range(4)
    }
    assert len(plateaus) == 1


def test_settings_table_takes_mean_and_deviation_over_seeds() -> None:
    gradinit = case(MULTI30K, GRADINIT, updates=100)
    runs = [
        run(valid_loss=5.0),
        run(replace(CASE, seed=2), valid_loss=6.0),
        run(replace(CASE, seed=3), valid_loss=None),
        # 30 s in updates of 0.25 s each.
        run(gradinit, 4.5, bleu=20.0, chrf=40.0, gradinit_seconds=30.0, seconds_per_update=0.25),
    ]
    (table,) = shown.settings_tables(runs)
    default, other = (dict(zip(table.header, row, strict=True)) for row in table.rows)
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
        run(replace(CASE, lr=lr, optimizer=adam(beta2)), loss)
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
    some = [run(case, losses[i % 4]) for i, case in enumerate(study.cases[::2])]
    for part in (some[:1], some):
        training.show(study, part, tmp_path)
        assert (tmp_path / f"training-{study.name}.png").stat().st_size > 5_000


def test_source_names_all_revisions_and_days() -> None:
    later = {"date": "2026-11-25T10:00:00+00:00", "git_revision": "abcdefghi", "git_dirty": True}
    runs = [run(), run(circumstances={**run().circumstances, **later})]
    source = shown.source(runs, "command")
    assert source.startswith("`command`: 2 runs of one thread each on CPU, 2 cores, ")
    assert "2026-11-23 to 2026-11-25" in source
    assert source.endswith(", torch 2.13, fairseq 1, revision 0123456 and abcdefg with changes")


# ---- The studies.


def test_studies_hold_each_case_once() -> None:
    for study in STUDIES.values():
        assert len(set(study.cases)) == len(study.cases) > 0
        assert len({case.folder_name for case in study.cases}) == len(study.cases)


def test_arms_differ_only_in_how_they_start(tmp_path) -> None:
    default, warmup, gradinit = (
        training_runs.training_command(case(MULTI30K, arm), tmp_path, tmp_path)
        for arm in (DEFAULT, WARMUP, GRADINIT)
    )
    different = [words for words in zip(default, warmup, strict=True) if len(set(words)) > 1]
    assert different == [("0", str(MULTI30K.warmup))]
    assert [word for word in gradinit if word != "--gradinit"] == default


def test_seeds_come_one_after_the_other() -> None:
    other = replace(CASE, lr=1.0, seed=7)
    assert training.with_seeds((CASE, other), (4, 5)) == tuple(
        replace(c, seed=seed) for seed in (4, 5) for c in (CASE, other)
    )


# ---- What is kept.


def test_a_run_comes_back_from_its_line(tmp_path) -> None:
    file = RunsFile(tmp_path / "runs.jsonl")
    case = replace(CASE, lr=0.1 + 0.2, arm=GRADINIT, optimizer=ADAM)
    file.append(run(case, gradinit_seconds=1.5, signatures=["a", "b"]))
    file.append(run(valid_loss=None))
    first, second = file.read()
    assert first == run(case, gradinit_seconds=1.5, signatures=["a", "b"])
    assert hash(first.case) == hash(case)
    assert second.status == "diverged"


@pytest.mark.parametrize("rest", ['{"case": {"co', json.dumps(asdict(run()))], ids=len)
def test_a_torn_line_is_left_out_and_cut_off(tmp_path, rest) -> None:
    file = RunsFile(tmp_path / "runs.jsonl")
    file.append(run())
    with file.path.open("a") as end:
        end.write(rest)
    assert file.read() == [run()]
    file.append(run(valid_loss=6.0))
    assert [kept.valid_loss for kept in file.read()] == [5.0, 6.0]


def test_a_line_of_something_else_is_named(tmp_path) -> None:
    file = RunsFile(tmp_path / "runs.jsonl")
    file.append(run())
    with file.path.open("a") as end:
        end.write('{"case": 3}\n')
    with pytest.raises(GradInitError, match=r"line 2 of .*runs\.jsonl"):
        file.read()


def test_only_the_same_case_on_the_same_corpus_is_kept() -> None:
    renamed = replace(DEFAULT, title="other title", colour="black")
    old = run(corpus_digest="d0", valid_loss=1.0)
    again = run(replace(CASE, arm=renamed), 3.0)
    runs = [
        *(old, run(valid_loss=2.0), again, run(replace(CASE, seed=9), 4.0)),
        *(run(replace(CASE, lr=0.5)), run(replace(CASE, updates=50))),
    ]
    found = kept_runs([CASE], runs, {})
    assert [(r.case.seed, r.valid_loss) for r in found] == [(1, 3.0), (9, 4.0)]
    assert found[0].case.arm.title == DEFAULT.title
    given = {CASE.corpus: Corpus(Path(), "d0", 9.8)}
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


def test_what_is_kept_is_not_run_again(tmp_path, prepared, monkeypatch, capsys) -> None:
    ran = []

    class FakeRunner:
        def __init__(self, corpora, *_):
            self.digest = corpora["multi30k"].digest

        def __call__(self, case):
            ran.append(case)
            return run(case, None if case.lr > 1 else 5.0, corpus_digest=self.digest)

    monkeypatch.setattr(training, "Runner", FakeRunner)
    study = ("sgd", "--corpus", f"multi30k={prepared}")
    assert conduct(tmp_path, *study, "--only", "lr 2 ") == 0
    assert len(ran) == 3
    assert conduct(tmp_path, *study, "--workers", "3") == 0
    assert sorted(map(hash, ran)) == sorted(map(hash, STUDIES["sgd"].cases))
    assert conduct(tmp_path, *study) == 0
    assert conduct(tmp_path, *study, "--seeds", "1", "2", "--only", "gradinit") == 0
    assert [case.seed for case in ran[len(STUDIES["sgd"].cases) :]] == [2] * len(training.SGD_RATES)
    count = len(ran)
    capsys.readouterr()
    assert conduct(tmp_path, "sgd", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(STUDIES["sgd"].cases)
    assert all(line.endswith(", kept") for line in lines)
    write_manifest(prepared, "2")
    assert conduct(tmp_path, *study, "--only", "lr 2 ") == 0
    assert len(ran) == count + 3


def test_a_failure_stops_what_has_not_begun(tmp_path) -> None:
    begun = []

    def run_one(case: Case) -> Run:
        begun.append(case.seed)
        if case.seed == 2:
            raise RunError("it broke (its whole output: x.log)")
        return run(case)

    file = RunsFile(tmp_path / "runs.jsonl")
    with pytest.raises(RunError, match=r"x\.log"):
        run_all([replace(CASE, seed=seed) for seed in range(1, 9)], run_one, file, workers=1)
    assert begun == [1, 2]
    assert [kept.case.seed for kept in file.read()] == [1]


def test_progress_estimates_from_what_is_done(tmp_path) -> None:
    line = training_runs.progress(run(bleu=12.34), 2, 6, 30.0)
    assert line.startswith(f"{CASE.label}: validation loss 5.000, BLEU 12.3;")
    assert line.endswith("2 of 6 after 0:00:30, about 0:01:00 to go")
    assert training_runs.progress(run(valid_loss=None), 6, 6, 30.0).endswith(
        "diverged; 6 of 6 after 0:00:30"
    )


@pytest.fixture
def fake_program(tmp_path, monkeypatch):
    """Puts a shell script in the place of fairseq's programs."""

    def install(script: str) -> None:
        path = tmp_path / "fairseq-fake"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(training_runs, "program", lambda name: [str(path)])

    return install


def valid_line(update: int, loss: float) -> str:
    values = json.dumps({"valid_loss": str(loss), "valid_num_updates": str(update)})
    return f"echo '2026 | INFO | valid | {values}'\n"


def run_case(tmp_path: Path, case: Case = CASE) -> Run:
    corpora = {case.corpus: Corpus(tmp_path / "corpus", "d1", 9.8)}
    return Runner(corpora, tmp_path / "work")(case)


def test_a_run_is_what_its_log_says(tmp_path, fake_program) -> None:
    lines = [
        f'{{"loss": "{loss}", "num_updates": "{update}", "ups": "{ups}"}}'
        for update, loss, ups in ((50, 9.5, 4.0), (100, 7.5, 2.0), (75, "inf", 5.0))
    ]
    script = "echo '2026 | INFO | fairseq_gradinit | scales saved in x (12.5 s in all)'\n"
    script += "".join(f"echo '2026 | INFO | train_inner | {line}'\n" for line in lines)
    fake_program(script + valid_line(50, 9.25) + valid_line(100, 7.25) + 'echo "$OMP_NUM_THREADS"')
    found = run_case(tmp_path)
    assert (found.status, found.reason, found.valid_loss) == ("finished", None, 7.25)
    assert found.valid == ((50, 9.25), (100, 7.25))
    assert found.training == ((50, 9.5), (75, None), (100, 7.5))
    assert (found.gradinit_seconds, found.seconds_per_update) == (12.5, 0.25)
    assert found.commands[0].startswith("fairseq-fake multi30k/data-bin ")
    assert str(tmp_path) not in json.dumps(asdict(found))
    assert (tmp_path / "work" / CASE.folder_name / "train.log").read_text().endswith("\n1\n")


def test_scales_are_learned_for_another_run_first(tmp_path, fake_program) -> None:
    fake_program('echo "$@"\n' + valid_line(100, 7.0))
    other = replace(CASE, arm=GRADINIT, seed=4, corpus="other")
    own = replace(CASE, arm=GRADINIT, scales_of=other)
    assert own.corpora == {"multi30k", "other"}
    corpora = {name: Corpus(tmp_path / name, "d1", 9.8) for name in own.corpora}
    found = Runner(corpora, tmp_path / "work")(own)
    learn, train = found.commands
    assert learn.startswith("fairseq-fake other/data-bin ")
    assert "--seed 4 " in learn
    assert learn.endswith("/learned --max-update 1 --disable-validation")
    assert train.startswith("fairseq-fake multi30k/data-bin ")
    assert train.endswith(f"--gradinit-scales {own.folder_name}/learned/gradinit_scales.json")
    file = RunsFile(tmp_path / "runs.jsonl")
    file.append(found)
    assert file.read()[0].case == own


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (valid_line(50, 9.0) + valid_line(100, math.nan), "the validation loss is not finite"),
        (
            valid_line(50, 9.0) + "echo 'FloatingPointError: gradients are Nan/Inf'; exit 1",
            "FloatingPointError: gradients are Nan/Inf",
        ),
    ],
    ids=["nan", "exception"],
)
def test_a_diverged_run_is_kept_as_such(tmp_path, fake_program, script, reason) -> None:
    fake_program(script)
    (tmp_path / "corpus").mkdir()
    write_manifest(tmp_path / "corpus", "1")
    found = run_case(tmp_path, replace(CASE, scored=True))
    assert (found.status, found.reason, found.valid_loss) == ("diverged", reason, None)
    assert found.valid[0] == (50, 9.0)
    assert found.bleu is None


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo 'KeyError: x'; exit 1", "KeyError: x .its whole output: "),
        (valid_line(50, 9.0), "no validation loss after the last update in "),
    ],
    ids=["error", "early end"],
)
def test_a_failing_command_names_its_log(tmp_path, fake_program, script, sentence) -> None:
    fake_program(script)
    with pytest.raises(RunError, match=rf"{sentence}{tmp_path}/.*/train\.log"):
        run_case(tmp_path)


def test_checkpoints_are_not_left_behind(tmp_path, fake_program) -> None:
    save = 'while [ "$1" != --save-dir ]; do shift; done; mkdir "$2"; touch "$2/crash.pt"\n'
    fake_program(save + valid_line(100, 7.0))
    run_case(tmp_path)
    assert [p.name for p in (tmp_path / "work" / CASE.folder_name).iterdir()] == ["train.log"]


# ---- With fairseq.


def tiny(case: Case) -> Case:
    model = training.transformer(layers=1, width=16, ffn=32, heads=2)
    return replace(case, model=model, updates=4, max_tokens=200)


@pytest.mark.slow
def test_a_tiny_study(tmp_path, prepared, capsys, monkeypatch) -> None:
    arm = replace(GRADINIT, options=("--gradinit", "--gradinit-iterations", "2"))
    study = replace(STUDIES["arms"], cases=(tiny(case(QUICKSTART, arm, scored=True)),))
    monkeypatch.setitem(STUDIES, "arms", study)
    assert conduct(tmp_path, "arms", "--corpus", f"quickstart={prepared}") == 0
    (kept,) = RunsFile(tmp_path / "results" / "training-arms.jsonl").read()
    assert kept.status == "finished"
    assert [update for update, _ in kept.valid] == [1, 2, 3, 4]
    assert [update for update, _ in kept.training] == [1, 2, 3, 4]
    assert kept.valid_loss == kept.valid[-1][1] < kept.valid[0][1]
    assert kept.gradinit_seconds is not None  # 0.0 on a fast machine
    assert kept.seconds_per_update > 0.0
    assert "nrefs:1" in kept.signatures[0]
    assert kept.corpus_digest == Corpus.read(prepared).digest
    assert [command.split()[0] for command in kept.commands] == [
        "fairseq-train",
        "fairseq-generate",
    ]
    assert {"git_revision", "git_dirty", "torch", "fairseq", "date"} < set(kept.circumstances)
    printed = capsys.readouterr().out
    assert "| GradInit, no warmup | 0 | 1 |" in printed
    assert conduct(tmp_path, "arms", "--table") == 0
    assert capsys.readouterr().out == printed
    picture = tmp_path / "results" / "training-arms.png"
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_fairseq_diverges_as_the_benchmark_knows_it(tmp_path, prepared) -> None:
    hopeless = tiny(replace(STUDIES["sgd"].cases[0], lr=1e30))
    found = Runner({hopeless.corpus: Corpus.read(prepared)}, tmp_path)(hopeless)
    assert (found.status, found.valid_loss) == ("diverged", None)
    assert found.reason == "FloatingPointError: gradients are Nan/Inf"
