"""The quickstart on a tiny corpus: it trains, translates, scores, and fits itself to the machine.

fairseq's programs run in this process, except in the slow test.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import quickstart
import runner
from cases import RunError
from conftest import ENVIRONMENT, binarise, run_here, write_corpus, write_manifest
from tqdm import tqdm

from fairseq_gradinit.results import RunRecord, read_runs

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
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> quickstart.Settings:
    """A prepared corpus where `prepare.py quickstart` would have put it."""
    settings = quickstart.Settings(tmp_path_factory.mktemp("run"), updates=16, seed=1)
    for kind in ("text", "subwords"):
        (settings.corpus / kind).mkdir(parents=True)
        write_corpus(settings.corpus / kind, {"train": 1000, "valid": 20, "test": 21})
    prefixes = [f"--{part}pref" for part in ("train", "valid", "test")]
    paths = [str(settings.corpus / "text" / part) for part in ("train", "valid", "test")]
    binarise(
        settings.corpus / "data-bin",
        *("-s", "de", "-t", "en", "--joined-dictionary"),
        *(word for pair in zip(prefixes, paths, strict=True) for word in pair),
    )
    write_manifest(settings.corpus, "1")
    return settings


def run_program(command: Sequence[str], log_file: Path, *_: object) -> None:
    """In place of `programs.execute`."""
    outcome = run_here(command[0], *command[1:])
    log_file.write_text(outcome.output)
    assert outcome.code == 0, outcome.output


@pytest.fixture(scope="module")
def records(settings: quickstart.Settings) -> list[RunRecord]:
    """Of GradInit and of warmup."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "execute", run_program)
        gradinit, _, warmup = map(settings.run, settings.cases())
        return [quickstart.train_and_score(run, settings) for run in (gradinit, warmup)]


def test_arms_differ_only_in_how_they_start(settings):
    gradinit, no_warmup, warmup = (case.options for case in settings.cases())
    assert set(gradinit) ^ set(no_warmup) == {"--gradinit"}
    different = [words for words in zip(no_warmup, warmup, strict=True) if len(set(words)) > 1]
    assert different == [("0", "4")]


def test_results_are_those_of_the_logs(settings, records):
    for record, case in zip(records, settings.cases()[::2], strict=True):
        assert [update for update, _ in record.training] == list(range(2, 17, 2))
        log = (settings.run(case).folder / "train.log").read_text()
        assert f'"valid_loss": "{record.valid_loss}"' in log
        assert "nrefs:1|case:mixed" in record.scores[0].signatures[0]
    assert records[0].training != records[1].training
    assert set(records) <= set(read_runs([settings.run_dir / "results.jsonl"]))


def test_the_program_shows_the_arms_side_by_side(settings, records, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(quickstart, "prepare", lambda *_: None)
    monkeypatch.setattr(runner, "execute", run_program)
    words = ["--compare", "--updates", "16", "--run-dir", str(settings.run_dir)]
    assert quickstart.main(words) == 0
    lines = caplog.text.splitlines()
    (bleu,) = [line for line in lines if " BLEU  " in line and "nrefs" not in line]
    assert bleu.split()[-3::2] == [f"{record.scores[0].bleu:.2f}" for record in records]
    assert sum("translation  " in line for line in lines) == quickstart.EXAMPLES
    for update in (2, 4, 8):
        (row,) = [line for line in lines if f"training loss at {update} " in line]
        assert row.split()[-3::2] == [f"{dict(record.training)[update]:.2f}" for record in records]
    assert any("fairseq-interactive" in line for line in lines)
    assert (settings.outcome / "compare.png").read_bytes().startswith(b"\x89PNG")


# ---- The length.


def fitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: float, arms: int) -> int:
    monkeypatch.setattr(quickstart, "updates_per_second", lambda _: speed)
    settings = quickstart.Settings(tmp_path, updates=1, seed=1)
    return quickstart.fitting(settings, arms, quickstart.MINUTES[arms]).updates


@pytest.mark.parametrize(("all_cores", "threads"), [(2.0, None), (0.7, 1)])
def test_threads_are_those_that_train_faster(tmp_path, monkeypatch, all_cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    speeds = {None: all_cores, 1: 1.3}
    monkeypatch.setattr(quickstart, "updates_per_second", lambda each: speeds[each.threads])
    settings = quickstart.Settings(tmp_path, updates=1, seed=1)
    for _ in range(2):  # measured, and as it was kept
        found = quickstart.fitting(settings, 1, 60)
        assert found.run(found.cases()[0]).threads == threads
        assert found.updates == quickstart.planned(speeds[threads], 1, 60)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert quickstart.fitting(settings, 1, 30).threads is None


@pytest.mark.parametrize(
    ("speed", "arms", "updates"), [(3.6, 1, 1610), (1.5, 1, 600), (3.6, 3, 820), (1.2, 3, 240)]
)
def test_trainings_fill_the_minutes(tmp_path, monkeypatch, caplog, speed, arms, updates):
    caplog.set_level("INFO")
    assert fitting(tmp_path, monkeypatch, speed, arms) == updates
    assert f"{speed} updates a second here: {updates} updates" in caplog.text
    assert f"about {quickstart.MINUTES[arms]:.0f} minutes" in caplog.text
    assert "longer" not in caplog.text
    # What was chosen holds, however fast the machine is when the program is run again.
    assert fitting(tmp_path, monkeypatch, 9.0, arms) == updates


@pytest.mark.parametrize("arms", [1, 3])
def test_a_slow_machine_is_told_how_long_it_takes(tmp_path, monkeypatch, caplog, arms):
    caplog.set_level("INFO")
    assert fitting(tmp_path, monkeypatch, 0.5, arms) == quickstart.FEWEST_UPDATES[arms]
    minutes = (arms * quickstart.FEWEST_UPDATES[arms] + quickstart.GRADINIT_UPDATES) / 30
    assert f"about {minutes:.0f} minutes" in caplog.text
    assert "That is longer than" in caplog.text


def test_speed_is_that_of_a_short_training(settings, monkeypatch):
    def report(command: Sequence[str], log_file: Path, threads: int | None) -> None:
        assert "--gradinit" not in command
        assert "--no-save" in command
        speeds = ("1.0", "2.5", "2.5")
        lines = (
            f'{{"num_updates": "{i}", "loss": "9", "ups": "{u}"}}' for i, u in enumerate(speeds)
        )
        log_file.write_text("".join(f"2026 | INFO | train_inner | {line}\n" for line in lines))

    monkeypatch.setattr(quickstart, "execute", report)
    assert quickstart.updates_per_second(settings) == 2.5
    monkeypatch.setattr(quickstart, "execute", lambda _, log_file, threads: log_file.touch())
    with pytest.raises(RunError, match="did not say how long they took"):
        quickstart.updates_per_second(settings)


@pytest.mark.parametrize("words", [["--updates", "0"], ["--minutes", "-1"]], ids=str)
def test_lengths_that_cannot_be_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        quickstart.parse(words)
    assert f"{words[0]} must be more than 0" in capsys.readouterr().err


def test_progress_is_that_of_the_log():
    rows = [("gradinit", {"trial_loss": "8.3"}), ("train_inner", {"num_updates": "3", "loss": "9"})]
    with tqdm(total=5, file=io.StringIO()) as bar:
        for name, values in rows:
            quickstart.show_progress(f"10:00 | INFO | {name} | {json.dumps(values)}\n", bar)
        assert bar.n == 3
        assert bar.postfix == "loss 9"


@pytest.mark.slow
def test_the_program_with_the_real_ones(settings, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "corpus").symlink_to(settings.corpus)
    monkeypatch.setattr(quickstart, "prepare", lambda *_: None)
    monkeypatch.setattr(quickstart, "FEWEST_UPDATES", {1: 16})
    words = ["--minutes", "0.001", "--run-dir", str(tmp_path)]
    assert quickstart.main(words) == 0, caplog.text
    (found,) = read_runs([tmp_path / "results.jsonl"])
    assert (found.status, found.settings.updates) == ("finished", 16)
    assert len(found.training) == 8
