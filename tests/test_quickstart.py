"""The quickstart on a tiny corpus: it trains, translates, scores, and skips what is done.

fairseq's programs run in this process, except in the slow test.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import quickstart
from conftest import ENVIRONMENT, binarise, run_here, write_corpus, write_manifest
from tqdm import tqdm

MODEL = [
    *("--arch", "transformer_gradinit_tiny", "--encoder-layers", "1", "--decoder-layers", "1"),
    *("--encoder-embed-dim", "16", "--decoder-embed-dim", "16"),
]


SMALL = ["--max-tokens", "100", "--num-workers", "0", "--log-interval", "2"]


@pytest.fixture(scope="module", autouse=True)
def small_model() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "MODEL", MODEL)
        patch.setattr(quickstart, "HOUSEKEEPING", [*quickstart.HOUSEKEEPING, *SMALL])
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> quickstart.Settings:
    """A prepared corpus where `prepare.py quickstart` would have put it."""
    settings = quickstart.Settings(tmp_path_factory.mktemp("run"), updates=16, seed=1)
    text = settings.corpus / "text"
    text.mkdir(parents=True)
    write_corpus(text, {"train": 1000, "valid": 20, "test": 21})
    prefixes = [f"--{part}pref" for part in ("train", "valid", "test")]
    paths = [str(text / part) for part in ("train", "valid", "test")]
    binarise(
        settings.corpus / "data-bin",
        *("-s", "de", "-t", "en", "--joined-dictionary"),
        *(word for pair in zip(prefixes, paths, strict=True) for word in pair),
    )
    write_manifest(settings.corpus, "1")
    return settings


def run_program(command: Sequence[str], log_file: Path, *_: object) -> None:
    """In place of `follow_training` and `run_quietly`."""
    outcome = run_here(Path(command[0]).name, *command[1:])
    log_file.write_text(outcome.output)
    assert outcome.code == 0, outcome.output


@pytest.fixture(scope="module")
def results(settings: quickstart.Settings) -> list[quickstart.Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "follow_training", run_program)
        patch.setattr(quickstart, "run_quietly", run_program)
        return [quickstart.run_arm(arm, settings) for arm in (settings.arms[0], settings.arms[2])]


def test_arms_differ_only_in_how_they_start(settings):
    gradinit, no_warmup, warmup = (set(settings.training_command(arm)) for arm in settings.arms)
    folder = settings.run_dir / "16-updates-seed-1"
    assert gradinit ^ no_warmup == {
        "--gradinit",
        str(folder / "gradinit/checkpoints"),
        str(folder / "no-warmup/checkpoints"),
    }
    assert "--gradinit" not in warmup
    assert settings.arms[2].options == ("--warmup-updates", "4")


def test_results_are_those_of_the_logs(settings, results):
    for result in results:
        assert [update for update, _ in result.curve] == list(range(2, 17, 2))
        assert len(result.rows) == 21
        assert result.rows[3][0] == (settings.corpus / "text/test.de").read_text().split("\n")[3]
        log = (settings.folder(result.arm) / "train.log").read_text()
        assert f'"valid_loss": "{result.valid_loss}"' in log
        assert "nrefs:1|case:mixed" in result.scores.signatures[0]
    assert results[0].curve != results[1].curve


def test_a_finished_arm_is_not_run_again(settings, results, monkeypatch):
    monkeypatch.setattr(quickstart, "follow_training", pytest.fail)
    monkeypatch.setattr(quickstart, "run_quietly", pytest.fail)
    assert quickstart.run_arm(settings.arms[0], settings) == results[0]


def test_training_that_ended_before_it_was_noted_is_not_run_again(settings, results, monkeypatch):
    """fairseq-train would add an update."""
    monkeypatch.setattr(quickstart, "follow_training", pytest.fail)
    (settings.folder(settings.arms[2]) / "train.json").unlink()
    again = quickstart.train(settings.arms[2], settings)
    assert again["valid_loss"] == results[1].valid_loss


def test_another_corpus_starts_training_over(settings, results, monkeypatch, tmp_path):
    other = quickstart.Settings(tmp_path, settings.updates, settings.seed)
    shutil.copytree(settings.run_dir, other.run_dir, dirs_exist_ok=True)
    write_manifest(other.corpus, "2")

    class StartedOver(Exception):
        pass

    def follow(*_):
        assert not other.checkpoints(other.arms[0]).exists()
        raise StartedOver

    monkeypatch.setattr(quickstart, "follow_training", follow)
    with pytest.raises(StartedOver):
        quickstart.run_arm(other.arms[0], other)


def test_the_program_shows_the_arms_side_by_side(settings, results, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(quickstart, "prepare_corpus", lambda *_: None)
    monkeypatch.setattr(quickstart, "follow_training", run_program)
    monkeypatch.setattr(quickstart, "run_quietly", run_program)
    words = ["--compare", "--updates", "16", "--run-dir", str(settings.run_dir)]
    assert quickstart.main(words) == 0
    lines = caplog.text.splitlines()
    (bleu,) = [line for line in lines if " BLEU  " in line and "nrefs" not in line]
    assert bleu.split()[-3::2] == [f"{result.scores.bleu:.2f}" for result in results]
    assert sum("translation  " in line for line in lines) == quickstart.EXAMPLES
    for update in (2, 4, 8):
        (row,) = [line for line in lines if f"training loss at {update} " in line]
        assert row.split()[-3::2] == [f"{dict(result.curve)[update]:.2f}" for result in results]
    assert any("fairseq-interactive" in line for line in lines)
    assert (settings.outcome / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_training_is_followed_by_its_log(tmp_path):
    log = tmp_path / "train.log"
    line = """2026-11-23 10:00:00 | INFO | train_inner | {"loss": "9", "num_updates": "3"}"""
    with tqdm(total=5, file=io.StringIO()) as bar:
        quickstart.follow_training(["echo", line], log, bar)
        assert bar.n == 3
        with pytest.raises(quickstart.RunError, match=r"bash failed: broken \(.*train\.log\)"):
            quickstart.follow_training(["bash", "-c", "echo broken; exit 3"], log, bar)
    assert log.read_text() == f"{line}\nbroken\n"


@pytest.mark.slow
def test_an_arm_by_the_programs(settings, results, tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    other = quickstart.Settings(tmp_path, settings.updates, settings.seed)
    other.corpus.symlink_to(settings.corpus)
    found = quickstart.run_arm(other.arms[2], other)
    assert [update for update, _ in found.curve] == [update for update, _ in results[1].curve]
    assert len(found.rows) == len(results[1].rows)


def test_failure_names_the_log(tmp_path):
    log = tmp_path / "x.log"
    with pytest.raises(quickstart.RunError, match=r"false failed: .* \(.*x\.log\)"):
        quickstart.run_quietly(["false"], log)


def test_missing_translations_are_an_error(settings, results, tmp_path):
    generated = tmp_path / "generate-test.txt"
    full = (settings.folder(settings.arms[0]) / "generate-test.txt").read_text()
    generated.write_text(full.replace("H-7\t", "X-7\t"))
    with pytest.raises(quickstart.RunError, match="each of the 21 sentences"):
        quickstart.read_translations(generated, settings.corpus)


def test_moses_and_bpe_are_undone_before_scoring(tmp_path):
    (tmp_path / "text").mkdir()
    for language, text in {
        "de": 'Sie sagte: "Ja."\n',
        "en": 'She said, "Yes, I\'m well."\n',
    }.items():
        (tmp_path / f"text/test.{language}").write_text(text)
    write_manifest(tmp_path, "1", lowercase=True)
    generated = tmp_path / "generate-test.txt"
    generated.write_text("H-0\t-0.5\tshe said , &quot; yes , i &apos;m well . &quot;\n")
    command = quickstart.translation_command(tmp_path, tmp_path / "x.pt", tmp_path)
    assert command[command.index("--remove-bpe") + 1] == "subword_nmt"
    ((_, reference, translation, _),) = quickstart.read_translations(generated, tmp_path)
    assert translation == 'she said, "yes, i\'m well."'
    scores = quickstart.score(tmp_path, [reference], [translation])
    assert scores.bleu == pytest.approx(100)
    assert "case:lc" in scores.signatures[0]


def test_a_step_with_a_broken_marker_is_run_again(tmp_path):
    marker = tmp_path / "step.json"
    marker.write_text("{")
    report = quickstart.once(marker, {"a": 1}, lambda: {"x": 2})
    assert report["x"] == 2
    assert json.loads(marker.read_text()) == report
    assert quickstart.once(marker, {"a": 1}, pytest.fail) == report
    assert quickstart.once(marker, {"a": 2}, lambda: {"x": 3})["x"] == 3
