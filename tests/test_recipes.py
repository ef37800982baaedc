"""The recipes: what their commands are, what is refused, and smoke runs of them."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import recipe
from cases import RunError
from conftest import BIN, ENVIRONMENT, ROOT
from training_log import TrainingLog

from fairseq_gradinit.results import read_runs

FOLDER = ROOT / "recipes"
ARMS = sorted(path.stem for path in (FOLDER / "arms").iterdir())
CORPORA = sorted(path.parent.name for path in FOLDER.glob("*/corpus.sh"))


def environment(runs: Path) -> dict[str, str]:
    """Of a user whose virtual environment is active."""
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    return {**os.environ, **ENVIRONMENT, "PATH": path, "RUNS": str(runs)}


def bash(
    script: str | Path, *options: str, runs: Path, **knobs: str
) -> subprocess.CompletedProcess[str]:
    """Run a script."""
    return subprocess.run(
        ["bash", str(FOLDER / script), *options],
        env={**environment(runs), **knobs},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


# ---- The commands.


def test_every_corpus_has_every_arm():
    for corpus in CORPORA:
        assert sorted(p.stem for p in (FOLDER / corpus).iterdir()) == sorted([*ARMS, "corpus"])
        for arm in ARMS:
            assert os.readlink(FOLDER / corpus / f"{arm}.sh") == f"../arms/{arm}.sh"


def dry_run(tmp_path: Path, script: str, *options: str, **knobs: str) -> str:
    """What a recipe prints, for one seed."""
    knobs = {"SEEDS": "7", **knobs}
    done = bash(f"{script}.sh", "--dry-run", *options, runs=tmp_path / "runs", **knobs)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs").exists()
    return done.stdout


@pytest.mark.parametrize(
    ("script", "arm"),
    [
        *((f"multi30k/{arm}", arm) for arm in ARMS if arm != "scheme"),
        *((f"{corpus}/default-warmup", "default-warmup") for corpus in CORPORA),
        ("multi30k/scheme", "admin"),
    ],
)
def test_dry_run(tmp_path, script, arm):
    printed = dry_run(tmp_path, script, SCHEME="admin")
    (train,) = (line for line in printed.splitlines() if line.startswith("fairseq-train "))
    assert f"# == {script.split('/')[0]}/{arm}, seed 7" in printed
    assert "--seed 7 " in train
    assert ("--gradinit " in train) == ("gradinit" in arm)
    assert ("--optimizer sgd " in train) == arm.endswith("sgd")
    assert ("--warmup-updates 0 " in train) == (arm != "default-warmup")
    assert ("--init-scheme admin " in train) == (arm == "admin")


def test_dry_run_ends_with_the_recipe_as_it_was_given(tmp_path):
    printed = dry_run(tmp_path, "multi30k/gradinit-adam", "--smoke", LR="4e-3").splitlines()
    command = f"bash {FOLDER}/multi30k/gradinit-adam.sh --smoke"
    assert printed[-1] == f"env LR=4e-3 SEEDS=1 RUNS={tmp_path}/runs STEPS=score {command}"


def test_variables_decide_the_training(tmp_path):
    small = ("--encoder-embed-dim 128 ", "--max-tokens 1000 ", "--lr 2e-3 --warmup-updates 500 ")
    printed = dry_run(tmp_path, "multi30k/default-warmup")
    assert all(words in printed for words in small)
    base = ("--encoder-embed-dim 512 ", "--max-tokens 4096 ", "--lr 0.3 --warmup-updates 7 ")
    knobs = {"SIZE": "base", "LR": "0.3", "WARMUP": "7", "PRESET": "paper"}
    printed = dry_run(tmp_path, "libreoffice/gradinit-adam", **knobs)
    assert all(words in printed for words in (*base, "--gradinit-preset paper "))


def test_help_shows_variables_as_they_are(tmp_path):
    done = bash("multi30k/gradinit-sgd.sh", "--help", runs=tmp_path, SIZE="base", BEAM="9")
    assert done.returncode == 0, done.stderr
    for words in ("[VARIABLE=value ...] bash", "  UPDATES=2400\n", "  BEAM=9\n", "  MOMENTUM=0.9 "):
        assert words in done.stdout
    assert "  LR=0.0625                # peak learning rate" in done.stdout


# ---- Batches, and what is refused.


def variables(**changes: object) -> recipe.Variables:
    usual = {"WORKERS": 1, "GPUS": 0, "LAUNCH": "", "EXTRA": ""}
    usual |= {"BATCH_TOKENS": 32768, "MAX_TOKENS": "", "MOST_TOKENS": 4096}
    return recipe.Variables({name: str(value) for name, value in (usual | changes).items()})


@pytest.mark.parametrize(
    ("batch", "most", "workers", "max_tokens", "update_freq"),
    [
        *((32768, 4096, *row) for row in ((1, 4096, 8), (8, 4096, 1), (16, 2048, 1))),
        *((4096, 4096, 8, 512, 1), (1000, 1000, 4, 250, 1), (6000, 4096, 1, 3000, 2)),
    ],
)
def test_batches_are_the_same_on_any_number_of_gpus(batch, most, workers, max_tokens, update_freq):
    known = variables(BATCH_TOKENS=batch, MOST_TOKENS=most, WORKERS=workers, GPUS=workers)
    assert recipe.split_batch(known) == update_freq
    assert known.number("MAX_TOKENS") == max_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MAX_TOKENS": 3000}, "BATCH_TOKENS=32768 is no multiple of MAX_TOKENS=3000 times the 1 "),
        ({"MAX_TOKENS": "4k"}, "MAX_TOKENS=4k is no whole number"),
        ({"WORKERS": 4}, "WORKERS=4, and without LAUNCH 1 can be started: LAUNCH=launch/gloo.sh"),
    ],
    ids=str,
)
def test_trainings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(RunError) as error:
        recipe.training_options(variables(**changes))
    assert message in str(error.value)


def test_mistakes_are_refused_in_one_sentence(tmp_path):
    done = bash("wmt14_en_de/default-warmup.sh", "--dry-run", runs=tmp_path, STEPS="trian")
    assert done.returncode == 1
    assert done.stderr.startswith("default-warmup.sh: STEPS has trian, which is none of: prepare ")
    assert len(done.stderr.splitlines()) == 1


# ---- Sweeps.


@pytest.mark.slow
def test_a_sweep_shares_the_gpus_and_ends_in_a_table_though_a_point_fails(tmp_path):
    programs = {
        "nvidia-smi": "echo 'GPU 0: a' && echo 'GPU 1: b'",
        "show.sh": 'echo "device $CUDA_VISIBLE_DEVICES of $GPUS" && sleep 0.5 && [[ $LR != 1e20 ]]',
    }
    for name, lines in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    knobs = {
        **{"RECIPES": os.path.relpath(tmp_path / "show", FOLDER), "LRS": "1 2 3 1e20"},
        **{"BETA2S": "0.9", "JOBS": "4", "CUDA_VISIBLE_DEVICES": "3,5"},
        "RESULTS": str(FOLDER / "results" / "libreoffice.jsonl"),
        "PATH": os.pathsep.join([str(tmp_path), str(BIN), os.environ["PATH"]]),
    }
    done = bash("sweep.sh", runs=tmp_path, **knobs)
    assert done.returncode == 1
    assert "show with SEEDS=1 BETA2=0.9 LR=1e20 failed" in done.stderr
    devices = [line for line in done.stdout.splitlines() if line.startswith("device")]
    assert sorted(devices) == [f"device {n} of 1" for n in "3355"]
    assert "### libreoffice-help" in done.stdout
    assert (tmp_path / "heat-map.png").read_bytes().startswith(b"\x89PNG")


def test_points_of_a_sweep(tmp_path):
    knobs = {"LRS": "1e-3 1e20", "BETA2S": "0.98", "RECIPES": "multi30k/admin"}
    assert bash("sweep.sh", "--count", runs=tmp_path, **knobs).stdout.strip() == "2"
    # SGD has no beta2.
    sgd = {**knobs, "BETA2S": "0.9 0.98", "RECIPES": "multi30k/default-sgd multi30k/pre-ln"}
    assert bash("sweep.sh", "--count", runs=tmp_path, **sgd).stdout.strip() == "6"
    task = {"SLURM_ARRAY_TASK_ID": "1", "WARMUP": "30"}
    array = bash("sweep.sh", "--dry-run", runs=tmp_path, **task, **knobs)
    assert "# == multi30k/admin, seed 1" in array.stdout
    assert "--lr 1e20 --warmup-updates 30 " in array.stdout
    assert "--lr 1e-3 " not in array.stdout


# ---- The real programs.


@pytest.mark.slow
def test_scripts_are_clean_for_shellcheck():
    scripts = sorted(str(path) for path in FOLDER.rglob("*.sh") if not path.is_symlink())
    # The analysis of the flow of data would take most of the time.
    words = [BIN / "shellcheck", "-x", "--extended-analysis=false", *scripts]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole smoke run, with its corpus."""
    runs = tmp_path_factory.mktemp("runs")
    done = bash("multi30k/gradinit-adam.sh", "--smoke", runs=runs)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = read_runs([runs / "smoke/results.jsonl"])
    assert f"| {run.title}" in done.stdout
    return runs


@pytest.mark.slow
def test_a_whole_smoke_run_is_what_its_dry_run_prints(whole, tmp_path):
    (run,) = read_runs([whole / "smoke/results.jsonl"])
    assert (run.status, run.corpus, run.settings.updates) == ("finished", "numbers", 12)
    assert run.scores[0].tokenised_bleu is not None
    assert run.gradinit_seconds is not None
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke/data").symlink_to(whole / "smoke/data")
    printed = bash("multi30k/gradinit-adam.sh", "--smoke", "--dry-run", runs=tmp_path)
    done = subprocess.run(
        ["bash", "-e"],
        input=printed.stdout,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (pasted,) = read_runs([tmp_path / "smoke/results.jsonl"])
    assert (pasted.settings, pasted.valid, pasted.scores) == (run.settings, run.valid, run.scores)


@pytest.mark.slow
def test_a_recipe_trains_on_several_processes(whole):
    knobs = {"LAUNCH": "launch/gloo.sh", "WORKERS": "2", "STEPS": "prepare train"}
    done = bash("wmt14_en_de/scheme.sh", "--smoke", runs=whole, SCHEME="pre-ln", **knobs)
    assert done.returncode == 0, done.stdout + done.stderr
    (stamp,) = whole.glob("smoke/wmt14_en_de/pre-ln/*/seed-1/train.done")
    assert TrainingLog.read(stamp.with_name("train.log")).valid[-1][0] == 12


def kill_when(runs: Path, file: str, text: str) -> None:
    """Start a recipe, and kill it once this text is in such a file of its run."""
    seed = "smoke/multi30k/gradinit-adam/*/seed-1"
    with subprocess.Popen(
        ["bash", str(FOLDER / "multi30k/gradinit-adam.sh"), "--smoke"],
        env=environment(runs),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        while not any(text in p.read_text(errors="replace") for p in runs.glob(f"{seed}/{file}")):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    for lock in runs.glob(f"{seed}/lock"):
        with lock.open() as held:
            # All that the recipe has started hold it until they are gone.
            fcntl.flock(held, fcntl.LOCK_EX)


@pytest.mark.slow
def test_a_recipe_killed_while_it_learns_trains_and_translates_ends_with_the_same_scores(
    whole, tmp_path
):
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke/data").symlink_to(whole / "smoke/data")
    kill_when(tmp_path, "train.log", "GradInit: learning")
    kill_when(tmp_path, "checkpoints/checkpoint_1_*.pt", "")
    kill_when(tmp_path, "translate-test.log", "\n")
    done = bash("multi30k/gradinit-adam.sh", "--smoke", runs=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: done before" in done.stdout
    (broken,) = read_runs([tmp_path / "smoke/results.jsonl"])
    (run,) = read_runs([whole / "smoke/results.jsonl"])
    assert (broken.settings, broken.valid, broken.scores) == (run.settings, run.valid, run.scores)
