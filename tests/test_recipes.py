"""The recipes as a user runs them, on the tiny corpus of --smoke."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import average_checkpoints
import pytest
import resume
import run_record
import torch
from conftest import BIN, ENVIRONMENT, ROOT, warm_programs
from fairseq_runs import TrainingLog

from fairseq_gradinit.results import RunRecord, read_runs
from fairseq_gradinit.schemes.options import SCHEMES

FOLDER = ROOT / "recipes"
# Of a corpus the baseline first, so that the others can be compared with it.
ARMS = (
    *("default-warmup", "default-no-warmup", "default-sgd", "gradinit-adam", "gradinit-sgd"),
    "pre-ln",
)
SCHEME_ARMS = [f"multi30k/{name}" for name in SCHEMES]
CORPORA = ("multi30k", "libreoffice", "iwslt14_de_en", "wmt14_en_de")
RECIPES = [f"{corpus}/{arm}" for corpus in CORPORA for arm in ARMS]


def environment(runs: Path) -> dict[str, str]:
    """Of a user whose virtual environment is active."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **ENVIRONMENT, "PATH": path, "RUNS": str(runs)}


def bash(script: str, *options: str, runs: Path, **knobs: str) -> subprocess.CompletedProcess[str]:
    """Run a script; its programs have stand-ins, unless PATH is given."""
    path = FOLDER / script
    if not path.exists():
        path, knobs = path.with_name("scheme.sh"), {"SCHEME": path.stem, **knobs}
    variables = environment(runs)
    variables["PATH"] = f"{warm_programs()}{os.pathsep}{variables['PATH']}"
    return subprocess.run(
        ["bash", str(path), *options],
        env={**variables, **knobs},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def records(runs: Path) -> dict[str, RunRecord]:
    return {run.recipe: run for run in read_runs([runs / "smoke" / "results.jsonl"])}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the smoke runs lie, with the corpus that they share."""
    return tmp_path_factory.mktemp("runs")


def test_scripts_are_clean_for_shellcheck():
    scripts = sorted(map(str, FOLDER.rglob("*.sh")))
    assert len(scripts) > len(RECIPES)
    # The analysis of the flow of data would take most of the time.
    words = [BIN / "shellcheck", "-x", "--extended-analysis=false", *scripts]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize("corpus", CORPORA)
def test_smoke_runs(smoke, corpus):
    for arm in ARMS:
        recipe = f"{corpus}/{arm}"
        # What comes after training is the same for all arms of a corpus.
        whole = corpus == "multi30k" or arm in ("default-warmup", "gradinit-adam")
        steps = {} if whole else {"STEPS": "prepare train"}
        done = bash(f"{recipe}.sh", "--smoke", runs=smoke, **steps)
        assert done.returncode == 0, done.stdout + done.stderr
        if not whole:
            (stamp,) = smoke.glob(f"smoke/{recipe}/*/seed-1/train.done")
            assert TrainingLog.read(stamp.with_name("train.log")).valid[-1][0] == 12
            continue
        run = records(smoke)[recipe]
        assert (run.status, run.corpus, run.settings.updates) == ("finished", "numbers", 12)
        assert [part.name for part in run.scores] == ["test"]
        assert run.scores[0].tokenised_bleu is not None
        assert (run.gradinit_seconds is not None) == ("gradinit" in recipe)
        assert (run.comparison is None) == recipe.endswith("default-warmup")
        assert f"| {run.title}" in done.stdout


def test_what_is_done_is_not_done_again(smoke):
    bash("multi30k/gradinit-adam.sh", "--smoke", runs=smoke)
    before = (smoke / "smoke/results.jsonl").read_bytes()
    done = bash("multi30k/gradinit-adam.sh", "--smoke", runs=smoke)
    for step in ("train", "average", "translate-test"):
        assert f"{step}: done before" in done.stdout
    assert (smoke / "smoke/results.jsonl").read_bytes() == before
    # What translates otherwise is translated again, and nothing else.
    (log,) = smoke.glob("smoke/multi30k/gradinit-adam/*/seed-1/translate-test.log")
    log.write_text("a line that was cut")
    done = bash("multi30k/gradinit-adam.sh", "--smoke", runs=smoke, LENPEN="0.5")
    assert "average: done before" in done.stdout
    assert "translate-test: done before" not in done.stdout
    longer = read_runs([smoke / "smoke/results.jsonl"])[-1]
    assert "--lenpen 0.5" in longer.settings.options
    assert log.read_text().startswith("a line that was cut\n")
    # What was decoded otherwise is no baseline.
    assert longer.comparison is None


def test_a_baseline_that_is_not_translated_yet_is_none(smoke):
    for arm in ("default-warmup", "gradinit-sgd"):
        bash(f"multi30k/{arm}.sh", "--smoke", runs=smoke)
    (run,) = smoke.glob("smoke/multi30k/gradinit-sgd/*/seed-1")
    (stamp,) = smoke.glob("smoke/multi30k/default-warmup/*/seed-1/translate-test.done")
    assert run_record.record(run).comparison is not None
    key = stamp.read_text()
    stamp.unlink()
    try:
        assert run_record.record(run).comparison is None
    finally:
        stamp.write_text(key)


def test_other_machines_write_nothing_that_the_first_one_writes(smoke):
    bash("multi30k/pre-ln.sh", "--smoke", runs=smoke, STEPS="prepare")
    (stamp,) = smoke.glob("smoke/multi30k/pre-ln/*/seed-1/corpus.sha256")
    digest = stamp.read_text()
    stamp.unlink()
    other = {"STEPS": "prepare", "NODE_RANK": "1"}
    done = bash("multi30k/pre-ln.sh", "--smoke", runs=smoke, **other)
    assert done.returncode == 0, done.stderr
    assert not stamp.exists()
    stamp.write_text(digest)


def test_a_file_system_without_locks_is_told_and_used(smoke, tmp_path):
    # util-linux's, where the system call is not there.
    (tmp_path / "flock").write_text("#!/bin/sh\nexit 65\n")
    (tmp_path / "flock").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{environment(smoke)['PATH']}"
    done = bash("multi30k/pre-ln.sh", "--smoke", runs=smoke, PATH=path, STEPS="prepare")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is on a file system without locks") == 2


def test_records_name_no_folder(smoke):
    bash("multi30k/default-warmup.sh", "--smoke", runs=smoke)
    for run in read_runs([smoke / "smoke/results.jsonl"]):
        assert run.commands[0].startswith("fairseq-train numbers/data-bin ")
        assert run.commands[0].endswith(" --save-dir checkpoints")


def killed_after(seconds: float, runs: Path) -> None:
    with subprocess.Popen(
        ["bash", str(FOLDER / "multi30k/gradinit-adam.sh"), "--smoke"],
        env=environment(runs),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)


def test_a_killed_recipe_goes_on_to_the_same_scores(smoke, tmp_path):
    bash("multi30k/gradinit-adam.sh", "--smoke", runs=smoke)
    for seconds in (1, 4, 7, 10, 13, 16):
        killed_after(seconds, tmp_path)
    # All of it by the programs that a user has.
    path = environment(tmp_path)["PATH"]
    done = bash("multi30k/gradinit-adam.sh", "--smoke", runs=tmp_path, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = records(tmp_path)["multi30k/gradinit-adam"]
    runs = read_runs([smoke / "smoke/results.jsonl"])
    unbroken = next(run for run in runs if run.settings == broken.settings)
    assert broken.valid == unbroken.valid
    assert broken.scores == unbroken.scores


def test_a_disk_that_is_full_is_told_and_nothing_half_written_is_believed(smoke, disk, tmp_path):
    bash("multi30k/pre-ln.sh", "--smoke", runs=smoke)
    (tmp_path / "runs/smoke").mkdir(parents=True)
    (tmp_path / "runs/smoke/data").symlink_to(smoke / "smoke/data")
    (tmp_path / "runs/smoke/multi30k").symlink_to(disk.folder)

    def run(steps: str) -> subprocess.CompletedProcess[str]:
        return bash("multi30k/pre-ln.sh", "--smoke", runs=tmp_path / "runs", STEPS=steps)

    disk.fill()
    done = run("prepare")
    assert done.returncode == 1
    assert "corpus.sha256 cannot be written: make room on its disk" in done.stderr
    disk.fill(leave=64)
    assert run("prepare").returncode == 0
    done = run("train")
    assert done.returncode == 1
    assert "train failed: there is no room left in " in done.stderr


@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_a_kill_around_the_last_checkpoint_adds_no_update(smoke, kept):
    """While it was copied, and after it before the stamp that says that training has ended."""
    bash("multi30k/pre-ln.sh", "--smoke", runs=smoke)
    results = (smoke / "smoke/results.jsonl").read_bytes()
    (stamp,) = smoke.glob("smoke/multi30k/pre-ln/*/seed-1/train.done")
    stamp.unlink()
    last = stamp.parent / "checkpoints/checkpoint_last.pt"
    whole = last.read_bytes()
    last.write_bytes(whole[: int(kept * len(whole))])
    done = bash("multi30k/pre-ln.sh", "--smoke", runs=smoke)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: done before" in done.stdout
    assert last.read_bytes() == whole
    assert (smoke / "smoke/results.jsonl").read_bytes() == results


def test_nothing_to_go_on_from_is_said(tmp_path, capsys):
    (tmp_path / "checkpoint_last.pt").write_bytes(b"PK")
    assert resume.main([str(tmp_path)]) == 1
    assert "no other checkpoint is there to go on from: remove it" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_broken_one(tmp_path, capsys):
    (tmp_path / "checkpoint_last.pt").mkdir()
    torch.save({"optimizer_history": [{"num_updates": 4}]}, tmp_path / "checkpoint_1_4.pt")
    assert resume.main([str(tmp_path)]) == 1
    assert "checkpoint_last.pt: Is a directory" in capsys.readouterr().err
    assert (tmp_path / "checkpoint_last.pt").is_dir()


def test_a_checkpoint_that_is_broken_is_not_averaged(tmp_path, capsys):
    good, bad = (tmp_path / f"checkpoint_1_{update}.pt" for update in (4, 8))
    torch.save({"model": {"weight": torch.ones(3)}}, good)
    bad.write_bytes(good.read_bytes()[:-30])
    output = tmp_path / "average.pt"
    assert average_checkpoints.main([str(tmp_path), "--last", "2", "--output", str(output)]) == 1
    assert f"{bad} is broken: remove it, and average others" in capsys.readouterr().err
    assert not output.exists()


def test_a_run_that_diverges_is_a_result(smoke):
    knobs = {"LR": "1e20", "SEEDS": "1"}
    done = bash("multi30k/default-no-warmup.sh", "--smoke", runs=smoke, **knobs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "diverged: FloatingPointError" in done.stdout
    runs = read_runs([smoke / "smoke/results.jsonl"])
    (run,) = (run for run in runs if run.settings.lr == 1e20)
    assert (run.status, run.valid_loss, run.scores) == ("diverged", None, ())
    again = bash("multi30k/default-no-warmup.sh", "--smoke", runs=smoke, **knobs)
    assert "train: done before" in again.stdout


def test_several_processes_train_as_one_batch(smoke):
    knobs = {"LAUNCH": "launch/gloo.sh", "WORKERS": "2"}
    done = bash("multi30k/gradinit-adam.sh", "--smoke", runs=smoke, **knobs)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = read_runs([smoke / "smoke/results.jsonl"])
    (run,) = (run for run in runs if run.circumstances.workers == 2)
    assert run.settings.tokens_per_batch == 1000
    assert run.status == "finished"


def test_sweep_ends_in_a_table_and_a_picture(smoke, tmp_path):
    if (smoke / "smoke/data").exists():
        shutil.copytree(smoke / "smoke/data", tmp_path / "smoke/data")
    knobs = {"LRS": "1e-3 1e20", "BETA2S": "0.98", "RECIPES": "multi30k/default-no-warmup"}
    assert bash("sweep.sh", "--count", runs=tmp_path, **knobs).stdout.strip() == "2"
    # SGD has no beta2.
    sgd = {**knobs, "BETA2S": "0.9 0.98", "RECIPES": "multi30k/default-sgd multi30k/pre-ln"}
    assert bash("sweep.sh", "--count", runs=tmp_path, **sgd).stdout.strip() == "6"
    mistyped = bash("sweep.sh", "--dryrun", runs=tmp_path, **knobs)
    assert (mistyped.returncode, mistyped.stdout) == (2, "")
    assert "--dryrun is no option" in mistyped.stderr
    done = bash("sweep.sh", "--smoke", runs=tmp_path, JOBS="2", **knobs)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = read_runs([tmp_path / "smoke/results.jsonl"])
    assert {run.settings.lr: run.status for run in runs} == {1e-3: "finished", 1e20: "diverged"}
    assert (tmp_path / "heat-map.png").stat().st_size > 5_000
    array = bash("sweep.sh", "--dry-run", runs=tmp_path, SLURM_ARRAY_TASK_ID="1", **knobs)
    assert "--lr 1e20 " in array.stdout
    assert "--lr 1e-3 " not in array.stdout


@pytest.mark.parametrize(
    ("visible", "expected"),
    [({}, ["0", "1"]), ({"CUDA_VISIBLE_DEVICES": "3,5"}, ["3", "5"])],
    ids=["all", "a choice"],
)
def test_jobs_of_a_sweep_share_the_gpus(tmp_path, visible, expected):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: a'\necho 'GPU 1: b'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    # In place of a recipe; it waits, so that the jobs run side by side.
    (tmp_path / "show.sh").write_text('echo "device $CUDA_VISIBLE_DEVICES of $GPUS" && sleep 0.5\n')
    knobs = {
        **visible,
        "RECIPES": os.path.relpath(tmp_path / "show", FOLDER),
        "LRS": "1 2 3 4",
        "BETA2S": "0.9",
        "JOBS": "4",
        "PATH": f"{tmp_path}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    done = bash("sweep.sh", "--dry-run", runs=tmp_path, **knobs)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"device {n} of 1" for n in expected for _ in "12"]


def test_sweeps_know_other_initialisations_by_name(tmp_path):
    knobs = {"LRS": "1e-3", "BETA2S": "0.98", "RECIPES": "multi30k/admin libreoffice/t-fixup"}
    done = bash("sweep.sh", "--dry-run", runs=tmp_path, WARMUP="30", **knobs)
    assert done.returncode == 0, done.stderr
    for recipe in knobs["RECIPES"].split():
        assert f"== {recipe}, seed 1" in done.stdout
        assert f"--init-scheme {recipe.split('/')[1]} " in done.stdout
    assert done.stdout.count("--warmup-updates 30 ") == 2


@pytest.mark.parametrize("recipe", dict.fromkeys(RECIPES + SCHEME_ARMS))
def test_dry_run_prints_the_commands_and_does_nothing(tmp_path, recipe):
    done = bash(f"{recipe}.sh", "--dry-run", runs=tmp_path / "runs", SEEDS="7")
    assert done.returncode == 0, done.stderr
    train = next(line for line in done.stdout.splitlines() if line.startswith("fairseq-train "))
    assert "--seed 7 " in train
    assert ("--gradinit " in train) == ("gradinit" in recipe)
    assert ("--warmup-updates 0 " in train) == (not recipe.endswith("default-warmup"))
    assert f"== {recipe}, seed 7" in done.stdout
    arm = recipe.split("/")[1]
    assert (f"--init-scheme {arm} " in train) == (arm in SCHEMES)
    assert not (tmp_path / "runs").exists()


def test_paper_preset_takes_its_first_step_at_the_full_rate_as_its_authors_do(tmp_path):
    done = bash("iwslt14_de_en/gradinit-adam.sh", "--dry-run", runs=tmp_path, PRESET="paper")
    assert "--gradinit-preset paper " in done.stdout
    assert "--lr 5e-4 --warmup-updates 0 --lr-scheduler polynomial_decay " in done.stdout


def test_size_decides_model_batch_and_rate(tmp_path):
    base = ("--encoder-embed-dim 512 ", "--max-tokens 4096 ", "--lr 5e-4 --warmup-updates 600 ")
    small = ("--encoder-embed-dim 128 ", "--max-tokens 1000 ", "--lr 2e-3 --warmup-updates 500 ")
    for size, words in (("base", base), ("small", small)):
        done = bash("multi30k/default-warmup.sh", "--dry-run", runs=tmp_path, SIZE=size, SEEDS="1")
        assert all(word in done.stdout for word in words), done.stdout
    given = {"SIZE": "base", "LR": "0.3", "WARMUP": "7"}
    done = bash("libreoffice/default-warmup.sh", "--dry-run", runs=tmp_path, **given)
    assert "--lr 0.3 --warmup-updates 7 " in done.stdout


def test_help_shows_variables_as_they_are(tmp_path):
    done = bash("multi30k/gradinit-sgd.sh", "--help", runs=tmp_path, SIZE="base", BEAM="9")
    assert done.returncode == 0, done.stderr
    for words in ("[VARIABLE=value ...] bash", "  UPDATES=2400 ", "  BEAM=9 ", "  MOMENTUM=0.9 "):
        assert words in done.stdout
    assert "  LR=0.0625                # peak learning rate" in done.stdout


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"MAX_TOKENS": "3000"}, "choose a MAX_TOKENS that divides 32768"),
        ({"GPUS": "3"}, "BATCH_TOKENS=32768 cannot be divided by the 3 processes that train"),
        ({"WORKERS": "4"}, "WORKERS=4, and without LAUNCH 1 can be started: LAUNCH=launch/gloo.sh"),
        ({"WORKERS": "0"}, "WORKERS=0: there must be at least one process"),
        (
            {"GPUS": "8", "WORKERS": "2", "LAUNCH": "launch/torchrun.sh"},
            "WORKERS=2, and launch/torchrun.sh starts one for each of NODES x GPUS = 1 x 8",
        ),
        ({"SIZE": "huge"}, "SIZE=huge is not among: base big"),
        ({"STEPS": "trian"}, "STEPS has trian, which is none of: prepare train"),
        ({"EXTRA": "--clip-norm 1 --update-freq=4"}, "EXTRA has --update-freq: set BATCH_TOKENS"),
        ({"EXTRA": "--encoder-layers 12"}, "EXTRA has --encoder-layers: the model's size"),
    ],
    ids=str,
)
def test_a_mistake_is_answered_by_a_sentence(tmp_path, knobs, message):
    done = bash("wmt14_en_de/default-warmup.sh", "--dry-run", runs=tmp_path, **knobs)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    ("recipe", "gpus", "max_tokens", "update_freq"),
    [
        *(("wmt14_en_de/gradinit-adam", *row) for row in ((0, 4096, 8), (2, 4096, 4))),
        *(("wmt14_en_de/gradinit-adam", *row) for row in ((8, 4096, 1), (16, 2048, 1))),
        *(("iwslt14_de_en/gradinit-adam", *row) for row in ((1, 4096, 1), (8, 512, 1))),
        *(("multi30k/gradinit-adam", *row) for row in ((0, 1000, 1), (4, 250, 1))),
    ],
)
def test_batches_are_the_same_on_any_number_of_gpus(
    tmp_path, recipe, gpus, max_tokens, update_freq
):
    done = bash(f"{recipe}.sh", "--dry-run", runs=tmp_path, GPUS=str(gpus), SEEDS="1")
    assert f"--max-tokens {max_tokens} --update-freq {update_freq} " in done.stdout


def test_what_a_process_takes_at_a_time_does_not_change_the_batch(tmp_path):
    done = bash("multi30k/pre-ln.sh", "--dry-run", runs=tmp_path, MAX_TOKENS="500", SEEDS="1")
    assert "--max-tokens 500 --update-freq 2 " in done.stdout


def test_another_corpus_under_a_run_is_refused(smoke):
    bash("multi30k/pre-ln.sh", "--smoke", runs=smoke)
    (stamp,) = smoke.glob("smoke/multi30k/pre-ln/*/seed-1/corpus.sha256")
    before = stamp.read_text()
    stamp.write_text("other")
    done = bash("multi30k/pre-ln.sh", "--smoke", runs=smoke)
    stamp.write_text(before)
    assert done.returncode == 1
    assert "is another one than when" in done.stderr


def test_scoring_what_has_not_ended_is_refused(smoke, tmp_path, capsys):
    bash("multi30k/pre-ln.sh", "--smoke", runs=smoke)
    (run,) = smoke.glob("smoke/multi30k/pre-ln/*/seed-1")
    copy = shutil.copytree(run, tmp_path / "run")
    lines = (copy / "train.log").read_text().splitlines()
    kept = [line for line in lines if '"valid_num_updates": "12"' not in line]
    (copy / "train.log").write_text("\n".join(kept))
    results = tmp_path / "results.jsonl"
    assert run_record.main(["score", str(copy), "--results", str(results)]) == 1
    assert "after 8 of 12 updates; give the recipe again" in capsys.readouterr().err
    assert not results.exists()
    assert run_record.main(["score", str(tmp_path), "--results", str(results)]) == 1
    assert "is no run of a recipe" in capsys.readouterr().err
