"""The runner: what is done when, and what a record says, with a fake of the programs."""

from __future__ import annotations

import fcntl
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import checkpoints
import programs
import pytest
import runner
import torch
from cases import Case, RunError
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

    `lines` end the log of fairseq-train, and `ran` are the programs, as they were started.
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
        folder, last = Path(option(command, "--save-dir")), option(command, "--max-update")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"optimizer_history": [{"num_updates": last}]}, folder / "checkpoint_last.pt")
        valid = f'{{"valid_loss": "{self.loss}", "valid_num_updates": "{last}"}}'
        log_file.open("a").write(f"2026-11-23 10:00:00 | INFO | valid | {valid}\n{self.lines}")
        if self.fails:
            raise RunError("fairseq-train failed: the last line")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Programs:
    fake = Programs()
    monkeypatch.setattr(runner, "execute", fake)
    return fake


@pytest.fixture
def run(tmp_path: Path, fake: Programs) -> Run:
    """On a corpus such as prepare.py makes, in RUNS/CORPUS/ARM/SETTINGS/seed-N."""
    corpus = tmp_path / "data" / "numbers"
    for kind in ("text", "tokens", "subwords"):
        (corpus / kind).mkdir(parents=True)
        write_corpus(corpus / kind, {"train": 20, "valid": 10, "test": 11})
    (corpus / "data-bin").mkdir()
    (corpus / "data-bin" / "dict.en.txt").write_text("".join(f"W{i} 1\n" for i in range(40)))
    write_manifest(corpus, "1", lowercase=False)
    case = replace(CASE, corpus=str(corpus))
    return Run(case, tmp_path / case.recipe / "settings" / "seed-1")


def other_run(run: Run, **changes: object) -> Run:
    """Beside the first, as its baseline."""
    case = replace(run.case, recipe="multi30k/default-warmup", **changes)
    return Run(case, run.folder.parents[3] / case.recipe / "settings" / f"seed-{case.seed}")


# ---- What is done when.


def test_finished_steps_are_skipped_and_those_with_another_setting_done_again(run, fake):
    first = run.carry_out()
    assert fake.ran == ["fairseq-train", "average", "fairseq-generate"]
    assert run.carry_out() == first
    other = replace(run.case, decoding=("--beam", "5", "--lenpen", "0.5"))
    found = replace(run, case=other).carry_out()
    assert fake.ran[3:] == ["fairseq-generate"]
    assert "--lenpen 0.5" in found.settings.options


def test_a_kill_after_the_last_checkpoint_adds_no_update(run, fake):
    run.carry_out(["train"])
    (run.folder / "train.done").unlink()
    run.carry_out(["train"])
    assert fake.ran == ["fairseq-train"]


def test_a_run_that_diverges_is_a_result(run, fake, tmp_path):
    fake.lines, fake.fails = "FloatingPointError: gradients are Nan/Inf\n", True
    results = tmp_path / "results.jsonl"
    found = run.carry_out(results=results)
    assert (found.status, found.reason) == ("diverged", fake.lines.strip())
    assert (found.valid_loss, found.scores, found.comparison) == (None, (), None)
    run.carry_out(results=results)
    assert fake.ran == ["fairseq-train"]
    assert read_runs([results]) == [found]


def test_a_run_that_ends_with_a_loss_that_is_not_finite_diverged(run, fake):
    fake.loss = float("nan")
    found = run.carry_out()
    assert (found.status, found.reason) == ("diverged", "the validation loss is not finite")
    assert found.valid == ((12, None),)


def test_a_failure_is_none(run, fake):
    fake.fails = True
    with pytest.raises(RunError, match="train: fairseq-train failed: the last line"):
        run.carry_out()
    fake.fails = False
    assert run.carry_out().status == "finished"


def test_scales_of_another_run_are_learned_first(run, fake):
    run.case = replace(run.case, scales_of=replace(run.case, seed=4))
    found = run.carry_out()
    assert fake.ran[:2] == ["fairseq-train", "fairseq-train"]
    learn, train = found.commands
    assert learn.endswith(" --seed 4 --save-dir learned --max-update 1 --disable-validation")
    assert train.endswith(" --gradinit-scales learned/gradinit_scales.json")
    assert found.settings.options[-1].startswith("--gradinit-scales of multi30k/gradinit-adam ")


def test_machines_after_the_first_only_train_and_write_no_stamps(run, fake):
    run.node = 1
    assert run.carry_out() is None
    assert fake.ran == ["fairseq-train"]
    assert {path.name for path in run.folder.iterdir()} == {"checkpoints", "train.node-1.log"}


def test_only_the_training_is_launched_as_several_processes(run):
    alone = list(run.plan(runner.STEPS))
    run.launch = ("bash", "gloo.sh")
    (_, train, key), *others = run.plan(runner.STEPS)
    assert train == ["bash", "gloo.sh", *alone[0][1]]
    assert [key, others] == [alone[0][2], alone[1:]]


def test_a_run_that_another_program_works_on_is_left_alone(run):
    run.folder.mkdir(parents=True)
    with (run.folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"another program is at work in "):
            run.carry_out()


def test_another_corpus_or_training_under_a_run_is_refused(run, fake, tmp_path):
    run.carry_out([])
    other = replace(run.case, options=(*run.case.options, "--clip-norm", "1"))
    with pytest.raises(RunError, match="was begun on another corpus or with other options"):
        replace(run, case=other).carry_out()
    write_manifest(Path(run.case.corpus), "2", lowercase=False)
    with pytest.raises(RunError, match="was begun on another corpus or with other options"):
        run.carry_out()
    run.case = replace(run.case, corpus=str(tmp_path))
    with pytest.raises(RunError, match="there is no corpus in "):
        run.carry_out()
    assert fake.ran == []


# ---- Programs.


def test_a_failing_program_is_named_with_its_log_and_a_full_disk(tmp_path, monkeypatch):
    words = ["bash", "-c", "echo broken; exit 3"]
    with pytest.raises(RunError, match=r"bash failed: broken \(its whole output: .*x\.log\)$"):
        programs.execute(words, tmp_path / "x.log")
    monkeypatch.setattr(programs.shutil, "disk_usage", lambda _: Namespace(free=0))
    with pytest.raises(RunError, match=r"x\.log\); the disk is full$"):
        programs.execute(words, tmp_path / "x.log")


# ---- Records.


def test_records_of_finished_runs(run, tmp_path):
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
    assert found.valid == ((12, 5.0),)
    # No folder of this machine.
    (command,) = found.commands
    assert command.startswith("fairseq-train numbers/data-bin ")
    assert command.endswith(" --seed 1 --save-dir checkpoints")
    assert run.carry_out(results=tmp_path / "results.jsonl") == found
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, ["train"]), ({"decoding": ("--beam", "4")}, runner.STEPS), ({"seed": 2}, runner.STEPS)],
    ids=["not translated", "decoded otherwise", "another seed"],
)
def test_what_is_not_alike_is_no_baseline(run, changes, steps):
    other_run(run, **changes).carry_out(steps)
    assert run.carry_out().comparison is None


def test_what_is_not_whole_is_not_scored(run):
    run.carry_out()
    generated = run.folder / "generate-test.txt"
    generated.write_text(generated.read_text().replace("H-7\t", "X-7\t"))
    with pytest.raises(RunError, match="each of the 11 sentences"):
        run.carry_out()
    log = run.folder / "train.log"
    log.write_text(log.read_text().replace('"12"', '"8"'))
    with pytest.raises(RunError, match="after 8 of 12 updates; run it again"):
        run.carry_out()


# ---- Checkpoints.


def test_a_broken_last_checkpoint_is_replaced_by_the_newest_other(tmp_path, capsys):
    words = ["updates", str(tmp_path)]
    assert checkpoints.main(words) == 0
    (tmp_path / "checkpoint_last.pt").write_bytes(b"PK")
    assert checkpoints.main(words) == 1
    for update in (4, 8):
        state = {"optimizer_history": [{"num_updates": update}]}
        torch.save(state, tmp_path / f"checkpoint_1_{update}.pt")
    assert checkpoints.main(words) == 0
    printed = capsys.readouterr()
    assert printed.out == "0\n8\n"
    assert "there is no other checkpoint to resume from: remove it" in printed.err
    assert torch.load(tmp_path / "checkpoint_last.pt") == state


def test_the_mean_is_that_of_the_last_checkpoints(tmp_path, capsys):
    for update in (8, 16, 24):
        model = {"weight": torch.tensor([update / 4]), "count": torch.tensor(update)}
        torch.save({"model": model}, tmp_path / f"checkpoint_1_{update}.pt")
    words = ["average", str(tmp_path), "--output", str(tmp_path / "average.pt"), "--last"]
    assert checkpoints.main([*words, "2"]) == 0
    mean = torch.load(tmp_path / "average.pt")["model"]
    assert mean == {"weight": torch.tensor([5.0]), "count": torch.tensor(24)}
    assert checkpoints.main([*words, "4"]) == 1
    assert "holds 3 checkpoints named checkpoint_EPOCH_UPDATE.pt" in capsys.readouterr().err
