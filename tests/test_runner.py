"""The runner: what is done when, and what a record says, with a fake of the programs."""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import checkpoints
import programs
import pytest
import records
import runner
import torch
from cases import Begun, Case, RunError, begin
from conftest import write_corpus, write_manifest
from runner import Run

from fairseq_gradinit.results import read_runs

CASE = Case(
    recipe="multi30k/gradinit-adam",
    title="GradInit",
    model="tiny",
    corpus="",
    source="de",
    target="en",
    pieces="subword_nmt",
    options=(
        *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", "1e-3"),
        *("--warmup-updates", "0", "--max-update", "12", "--gradinit"),
    ),
    tokens_per_batch=100,
    average=2,
    decoding=("--beam", "5", "--lenpen", "1"),
    baseline="multi30k/default-warmup",
)


def option(command: Sequence[str], name: str) -> str:
    return command[command.index(name) + 1]


@dataclass
class Programs:
    """In place of `programs.execute`: leaves in no time what the real programs would.

    Attributes:
        lines: more of the log of fairseq-train, and whether it fails then.
        ran: names of the programs, as they were started.
    """

    lines: str = ""
    fails: bool = False
    loss: float = 5.0
    ran: list[str] = field(default_factory=list)

    def __call__(self, command: Sequence[str], log_file: Path, *_: object) -> None:
        program = next(word for word in command if word.startswith("fairseq-") or "average" in word)
        self.ran.append(program)
        if program == "fairseq-train":
            self.train(command, log_file)
        elif program == "fairseq-generate":
            corpus = Path(command[1]).parent
            text = (corpus / "subwords" / "test.en").read_text().splitlines()
            lines = "".join(f"H-{i}\t-0.5\t{line}\n" for i, line in enumerate(text))
            Path(option(command, "--results-path"), "generate-test.txt").write_text(lines)
        log_file.open("a").write("done\n")

    def train(self, command: Sequence[str], log_file: Path) -> None:
        folder = Path(option(command, "--save-dir"))
        folder.mkdir(parents=True, exist_ok=True)
        text = ""
        for update in range(4, int(option(command, "--max-update")) + 1, 4):
            start = f"2026-11-23 10:00:{update:02} | INFO |"
            text += f'{start} train_inner | {{"num_updates": "{update}", "loss": "9"}}\n'
            text += f'{start} valid | {{"valid_loss": "{self.loss}", '
            text += f'"valid_num_updates": "{update}"}}\n'
            torch.save({"optimizer_history": [{"num_updates": update}]}, folder / "new.pt")
            (folder / "new.pt").rename(folder / "checkpoint_last.pt")
        log_file.open("a").write(text + self.lines)
        if self.fails:
            raise RunError("fairseq-train failed: the last line")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Programs:
    fake = Programs()
    monkeypatch.setattr(runner, "execute", fake)
    return fake


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus such as prepare.py makes."""
    folder = tmp_path_factory.mktemp("prepared") / "numbers"
    for kind in ("text", "tokens", "subwords"):
        (folder / kind).mkdir(parents=True)
        write_corpus(folder / kind, {"train": 20, "valid": 10, "test": 11})
    (folder / "data-bin").mkdir()
    for name in ("dict.de.txt", "dict.en.txt"):
        (folder / "data-bin" / name).write_text("".join(f"W{i} 1\n" for i in range(40)))
    (folder / "data-bin" / "train.bin").touch()
    write_manifest(folder, "1", lowercase=False)
    return folder


@pytest.fixture
def run(prepared: Path, tmp_path: Path, fake: Programs) -> Run:
    """RUNS/CORPUS/ARM/SETTINGS/seed-N"""
    case = replace(CASE, corpus=str(prepared))
    return Run(case, tmp_path / case.recipe / "settings" / "seed-1")


def other_run(run: Run, **changes: object) -> Run:
    """Beside the first, as its baseline."""
    case = replace(run.case, recipe="multi30k/default-warmup", **changes)
    return Run(case, run.folder.parents[3] / case.recipe / "settings" / f"seed-{case.seed}")


# ---- What is done when.


def test_finished_steps_are_skipped(run, fake):
    first = run.carry_out()
    assert fake.ran == ["fairseq-train", "average", "fairseq-generate"]
    assert run.carry_out() == first
    assert len(fake.ran) == 3


def test_translations_with_another_setting_are_made_again_and_nothing_else(run, fake):
    run.carry_out()
    other = replace(run.case, decoding=("--beam", "5", "--lenpen", "0.5"))
    found = replace(run, case=other).carry_out()
    assert fake.ran[3:] == ["fairseq-generate"]
    assert "--lenpen 0.5" in found.settings.options


def test_a_kill_after_the_last_checkpoint_adds_no_update(run, fake):
    run.carry_out(["train"])
    stamp = run.folder / "train.done"
    key = stamp.read_text()
    stamp.unlink()
    run.carry_out(["train"])
    assert fake.ran == ["fairseq-train"]
    assert stamp.read_text() == key


def test_what_saves_no_checkpoints_begins_with_an_empty_folder(run, fake):
    run.case = replace(run.case, options=(*run.case.options, "--no-save"), subsets=())
    run.folder.mkdir(parents=True)
    (run.folder / "train.log").write_text("of a run that was killed\n")
    run.carry_out(["train"])
    assert "killed" not in (run.folder / "train.log").read_text()
    run.carry_out(["train"])
    assert fake.ran == ["fairseq-train"]


def test_a_run_that_diverges_is_a_result(run, fake, tmp_path):
    fake.lines, fake.fails = "FloatingPointError: gradients are Nan/Inf\n", True
    results = tmp_path / "results.jsonl"
    found = run.carry_out(results=results)
    assert (found.status, found.reason) == (
        "diverged",
        "FloatingPointError: gradients are Nan/Inf",
    )
    assert (found.valid_loss, found.scores, found.comparison) == (None, (), None)
    run.carry_out(results=results)
    assert fake.ran == ["fairseq-train"]
    assert read_runs([results]) == [found]


def test_a_run_that_ends_with_a_loss_that_is_not_finite_diverged(run, fake):
    fake.loss = float("nan")
    found = run.carry_out()
    assert (found.status, found.reason) == ("diverged", "the validation loss is not finite")
    assert found.valid[-1] == (12, None)


def test_a_failure_is_none(run, fake):
    fake.fails = True
    with pytest.raises(RunError, match="train: fairseq-train failed: the last line"):
        run.carry_out()
    assert not (run.folder / "train.done").exists()
    fake.fails = False
    assert run.carry_out().status == "finished"


def test_scales_of_another_run_are_learned_first(run, fake, prepared):
    other = replace(run.case, seed=4)
    run.case = replace(run.case, scales_of=other)
    (_, learn), (_, train), *_ = run.commands()
    assert learn[-2:] == ["1", "--disable-validation"]
    assert option(learn, "--seed") == "4"
    assert option(train, "--gradinit-scales") == f"{run.folder}/learned/gradinit_scales.json"
    found = run.carry_out()
    assert fake.ran[:2] == ["fairseq-train", "fairseq-train"]
    assert found.settings.options[-1].startswith("--gradinit-scales of multi30k/gradinit-adam ")
    assert "--save-dir learned --max-update 1" in found.commands[0]
    assert found.commands[1].startswith("fairseq-train numbers/data-bin ")
    assert found.commands[1].endswith(" --gradinit-scales learned/gradinit_scales.json")


def test_machines_after_the_first_only_train_and_write_no_stamps(run, fake):
    run.node = 1
    assert run.carry_out() is None
    assert fake.ran == ["fairseq-train"]
    assert {path.name for path in run.folder.iterdir()} == {"checkpoints", "train.node-1.log"}


def test_only_the_training_is_launched_as_several_processes(run):
    run.launch = ("bash", "gloo.sh")
    first, second, *_ = (command[:2] for _, command, _ in run.plan(runner.STEPS))
    assert first == ["bash", "gloo.sh"]
    assert second != first
    keys = [key for *_, key in run.plan(runner.STEPS)]
    run.launch = ()
    assert keys == [key for *_, key in run.plan(runner.STEPS)]


def test_a_run_that_another_program_works_on_is_left_alone(run, fake):
    run.carry_out()
    with (run.folder / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"another program is at work in "):
            run.carry_out()


def test_a_file_system_without_locks_is_named_and_used(run, monkeypatch, caplog):
    def flock(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    run.carry_out(["train"])
    assert "lock is on a file system without locks" in caplog.text


def test_a_full_disk_is_named_and_nothing_half_written_is_believed(run, fake, disk):
    run.folder = disk.folder / "run"
    disk.fill()
    with pytest.raises(Exception, match=r"No space left"):
        run.carry_out()
    disk.fill(leave=64)
    run.carry_out([])
    fake.fails = True
    with pytest.raises(RunError, match="train failed: there is no room left in "):
        run.carry_out(["train"])
    assert not list(disk.folder.rglob("train.done"))


def test_another_corpus_or_training_under_a_run_is_refused(run, fake, prepared, tmp_path):
    run.carry_out([])
    other = replace(run.case, options=(*run.case.options, "--clip-norm", "1"))
    with pytest.raises(RunError, match="holds another training: remove that folder"):
        replace(run, case=other).carry_out()
    moved = shutil.copytree(prepared, tmp_path / "moved" / "numbers")
    run.case = replace(run.case, corpus=str(moved))
    run.carry_out([])
    (moved / "data-bin" / "train.bin").write_text("other")
    with pytest.raises(RunError, match=r"is another one than when .* was begun"):
        run.carry_out()
    run.case = replace(run.case, corpus=str(tmp_path))
    with pytest.raises(RunError, match="there is no corpus in "):
        run.carry_out()
    assert fake.ran == []


# ---- Programs.


def test_a_failing_program_is_named_with_its_log(tmp_path):
    log_file = tmp_path / "x.log"
    log_file.write_text("a line that was cut")
    with pytest.raises(RunError, match=r"bash failed: broken \(its whole output: .*x\.log\)"):
        programs.execute(["bash", "-c", "echo broken; exit 3"], log_file)
    assert log_file.read_text() == "a line that was cut\nbroken\n"
    with pytest.raises(RunError, match="it printed nothing"):
        programs.execute(["false"], tmp_path / "y.log")


def test_a_program_is_watched_and_has_its_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "WATCH_SECONDS", 0.01)
    told: list[str] = []
    words = ["bash", "-c", 'echo "$OMP_NUM_THREADS" && sleep 0.1 && echo b']
    programs.execute(words, tmp_path / "x.log", told.append, 3)
    assert "".join(told) == "3\nb\n"


# ---- Records.


def test_records_of_finished_runs(run, fake, tmp_path):
    other_run(run).carry_out()
    found = run.carry_out(results=tmp_path / "results.jsonl")
    assert found.comparison.baseline == "multi30k/default-warmup"
    assert (found.status, found.settings.updates, found.settings.lr) == ("finished", 12, 1e-3)
    assert found.settings.options == (
        *("--adam-betas (0.9, 0.98)", "--gradinit", "--average 2", "--beam 5", "--lenpen 1"),
    )
    (scores,) = found.scores
    assert (scores.name, scores.bleu) == ("test", pytest.approx(100))
    assert scores.tokenised_bleu == pytest.approx(100)
    assert found.valid == ((4, 5.0), (8, 5.0), (12, 5.0))
    # No folder of this machine.
    (command,) = found.commands
    assert command.startswith("fairseq-train numbers/data-bin ")
    assert command.endswith(" --seed 1 --save-dir checkpoints")
    words = [str(run.folder), "--results", str(tmp_path / "results.jsonl")]
    assert runner.main(words) == 0
    assert read_runs([tmp_path / "results.jsonl"]) == [found]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, ["train"]), ({"decoding": ("--beam", "4")}, runner.STEPS), ({"seed": 2}, runner.STEPS)],
    ids=["not translated", "decoded otherwise", "another seed"],
)
def test_what_is_not_alike_is_no_baseline(run, changes, steps):
    other_run(run, **changes).carry_out(steps)
    assert run.carry_out().comparison is None


def test_circumstances_are_those_of_the_start(run):
    run.folder.mkdir(parents=True)
    begin(run.folder, run.case)
    first = Begun.read(run.folder)
    begun = replace(first, circumstances=replace(first.circumstances, date="2026-01-01"))
    text = (run.folder / "run.json").read_text()
    (run.folder / "run.json").write_text(text.replace(first.circumstances.date, "2026-01-01"))
    begin(run.folder, run.case)
    assert Begun.read(run.folder) == begun


def test_scoring_an_unfinished_run_is_refused(run, tmp_path, capsys):
    run.carry_out(["train"])
    log = run.folder / "train.log"
    log.write_text(re.sub(r'.*"valid_num_updates": "12".*\n', "", log.read_text()))
    results = tmp_path / "results.jsonl"
    assert runner.main([str(run.folder), "--results", str(results)]) == 1
    assert "after 8 of 12 updates; run it again" in capsys.readouterr().err
    assert not results.exists()
    assert runner.main([str(tmp_path), "--results", str(results)]) == 1
    assert "is no run of a recipe" in capsys.readouterr().err


def test_missing_translations_are_an_error(run):
    run.carry_out()
    generated = run.folder / "generate-test.txt"
    generated.write_text(generated.read_text().replace("H-7\t", "X-7\t"))
    with pytest.raises(RunError, match="each of the 11 sentences"):
        records.record(run.folder)


# ---- Checkpoints.


def test_a_broken_last_checkpoint_is_replaced_by_the_newest_other(tmp_path, capsys):
    assert checkpoints.main(["updates", str(tmp_path)]) == 0
    for update in (4, 8):
        torch.save(
            {"optimizer_history": [{"num_updates": update}]}, tmp_path / f"checkpoint_1_{update}.pt"
        )
    (tmp_path / "checkpoint_last.pt").write_bytes(b"PK")
    assert checkpoints.main(["updates", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "0\n8\n"
    assert checkpoints.trained_updates(tmp_path) == 8


def test_a_broken_checkpoint_without_another_is_refused(tmp_path, capsys):
    (tmp_path / "checkpoint_last.pt").write_bytes(b"PK")
    assert checkpoints.main(["updates", str(tmp_path)]) == 1
    assert "there is no other checkpoint to resume from: remove it" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_is_kept(tmp_path, capsys):
    (tmp_path / "checkpoint_last.pt").mkdir()
    torch.save({"optimizer_history": [{"num_updates": 4}]}, tmp_path / "checkpoint_1_4.pt")
    assert checkpoints.main(["updates", str(tmp_path)]) == 1
    assert "checkpoint_last.pt: Is a directory" in capsys.readouterr().err
    assert (tmp_path / "checkpoint_last.pt").is_dir()


def test_a_broken_checkpoint_is_not_averaged(tmp_path, capsys):
    good, bad = (tmp_path / f"checkpoint_1_{update}.pt" for update in (4, 8))
    torch.save({"model": {"weight": torch.ones(3)}}, good)
    bad.write_bytes(good.read_bytes()[:-30])
    words = ["average", str(tmp_path), "--last", "2", "--output", str(tmp_path / "average.pt")]
    assert checkpoints.main(words) == 1
    assert f"{bad} is broken: remove it, and average others" in capsys.readouterr().err
    assert not (tmp_path / "average.pt").exists()
