"""The quickstart on a tiny corpus: it trains, translates, scores, and fits itself to the machine.

fairseq's programs run in this process, except in the slow test.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import quickstart
import runner
from conftest import ENVIRONMENT, binarise, run_here, write_corpus, write_manifest

from fairseq_gradinit.results import read_runs

SMALL = (
    *("--encoder-layers", "1", "--decoder-layers", "1"),
    *("--encoder-embed-dim", "16", "--decoder-embed-dim", "16"),
)
SHORT = ("--max-tokens", "100", "--num-workers", "0", "--log-interval", "2")


@pytest.fixture(scope="module", autouse=True)
def small_model() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "MODEL", (*quickstart.MODEL, *SMALL))
        patch.setattr(quickstart, "HOUSEKEEPING", (*quickstart.HOUSEKEEPING, *SHORT))
        patch.setattr(quickstart, "DECODING", ("--beam", "1", "--max-len-b", "10"))
        patch.setattr(quickstart, "prepare", lambda *_: None)
        yield


def run_program(command: Sequence[str], log_file: Path, *_: object) -> None:
    """In place of `programs.execute`."""
    fewer = ("--gradinit-iterations", "4") if "--gradinit" in command else ()
    outcome = run_here(command[0], *command[1:], *fewer)
    log_file.write_text(outcome.output)
    assert outcome.code == 0, outcome.output


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a corpus such as `prepare.py quickstart` makes, and all arms trained on it."""
    run_dir = tmp_path_factory.mktemp("run")
    corpus = run_dir / "corpus"
    for kind in ("text", "subwords"):
        (corpus / kind).mkdir(parents=True)
        write_corpus(corpus / kind, {"train": 1000, "valid": 20, "test": 21})
    text = corpus / "text"
    binarise(
        corpus / "data-bin",
        *("-s", "de", "-t", "en", "--joined-dictionary", "--trainpref", str(text / "train")),
        *("--validpref", str(text / "valid"), "--testpref", str(text / "test")),
    )
    write_manifest(corpus, "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "execute", run_program)
        for run in quickstart.arms(Namespace(run_dir=run_dir, seed=1), 16):
            quickstart.train_and_score(run, run_dir / "results.jsonl")
    return run_dir


def test_arms_differ_only_in_how_they_start(tmp_path):
    runs = quickstart.arms(Namespace(run_dir=tmp_path, seed=1), 16)
    gradinit, no_warmup, warmup = (run.case.options for run in runs)
    assert set(gradinit) ^ set(no_warmup) == {"--gradinit"}
    different = [words for words in zip(no_warmup, warmup, strict=True) if len(set(words)) > 1]
    assert different == [("0", "4")]


@pytest.mark.slow
def test_the_program_shows_the_arms_side_by_side(run_dir, caplog):
    caplog.set_level("INFO")
    words = ["--compare", "--updates", "16", "--run-dir", str(run_dir)]
    assert quickstart.main(words) == 0, caplog.text
    records = read_runs([run_dir / "results.jsonl"])
    assert [record.title for record in records] == [
        *("GradInit, no warmup", "default, no warmup", "default, warmup 4"),
    ]
    outcome = run_dir / "16-updates-seed-1"
    for record in records:
        assert [update for update, _ in record.training] == list(range(2, 17, 2))
        log = outcome / record.recipe.removeprefix("quickstart/") / "train.log"
        assert f'"valid_loss": "{record.valid_loss}"' in log.read_text()
    lines = caplog.text.splitlines()
    (bleu,) = [line for line in lines if " BLEU  " in line and "nrefs" not in line]
    assert bleu.split()[-3:] == [f"{record.scores[0].bleu:.2f}" for record in records]
    assert sum("translation  " in line for line in lines) == quickstart.EXAMPLES
    for update in (2, 4, 8):
        (row,) = [line for line in lines if f"training loss at {update} " in line]
        assert row.split()[-3:] == [f"{dict(record.training)[update]:.2f}" for record in records]
    assert (outcome / "compare.png").read_bytes().startswith(b"\x89PNG")


# ---- The length.


def fitting(run_dir: Path, count: int = 1, minutes: float | None = None) -> tuple[int, int | None]:
    return quickstart.fitting(Namespace(run_dir=run_dir, seed=1, minutes=minutes), count)


@pytest.mark.parametrize(("all_cores", "threads"), [(2.0, None), (0.7, 1)])
def test_threads_are_those_that_train_faster(tmp_path, monkeypatch, all_cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    speeds = {None: all_cores, 1: 1.3}
    monkeypatch.setattr(quickstart, "updates_per_second", lambda run: speeds[run.threads])
    assert fitting(tmp_path)[1] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert fitting(tmp_path, minutes=30)[1] is None


@pytest.mark.parametrize(
    ("speed", "arms", "updates", "minutes"),
    [(3.6, 1, 1610, 8), (3.6, 3, 820, 12), (1.2, 3, 240, 12), (0.5, 1, 500, 20)],
    ids=["one arm", "three arms", "slower", "fewest"],
)
def test_trainings_fill_the_minutes(tmp_path, monkeypatch, caplog, speed, arms, updates, minutes):
    caplog.set_level("INFO")
    monkeypatch.setattr(quickstart, "updates_per_second", lambda _: speed)
    assert fitting(tmp_path, arms)[0] == updates
    assert f"{speed} updates a second here: {updates} updates" in caplog.text
    assert f"about {minutes} minutes" in caplog.text
    # What was chosen holds, however fast the machine is when the program is run again.
    monkeypatch.setattr(quickstart, "updates_per_second", lambda _: 9.0)
    assert fitting(tmp_path, arms)[0] == updates


@pytest.mark.slow
def test_the_program_with_the_real_ones(run_dir, monkeypatch, caplog, capsys):
    caplog.set_level("INFO")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(quickstart, "FEWEST_UPDATES", {1: 12})
    words = ["--minutes", "0.001", "--run-dir", str(run_dir)]
    assert quickstart.main(words) == 0, caplog.text
    assert "12/12" in capsys.readouterr().err  # the progress bar
    *_, found = read_runs([run_dir / "results.jsonl"])
    assert (found.status, found.settings.updates) == ("finished", 12)
    assert len(found.training) == 6
