"""The recipes: what their commands are, what is done when, and smoke runs of them.

In most tests the programs that a recipe starts are fakes, which leave in no time what the real ones
would. The slow tests have the real ones.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import average_checkpoints
import pytest
import resume
import run_record
import torch
from conftest import BIN, ENVIRONMENT, ROOT, write_corpus, write_manifest
from fairseq_runs import TrainingLog

from fairseq_gradinit.plugin.schemes.options import SCHEMES
from fairseq_gradinit.results.records import read_runs

FOLDER = ROOT / "recipes"
ARMS = (
    *("default-warmup", "default-no-warmup", "default-sgd", "gradinit-adam", "gradinit-sgd"),
    "pre-ln",
)
SCHEME_ARMS = [f"multi30k/{name}" for name in SCHEMES]
CORPORA = ("multi30k", "libreoffice", "iwslt14_de_en", "wmt14_en_de")
RECIPES = [f"{corpus}/{arm}" for corpus in CORPORA for arm in ARMS]


def environment(runs: Path, *programs: Path) -> dict[str, str]:
    """Of a user whose virtual environment is active; `programs` come before it."""
    path = os.pathsep.join([*map(str, programs), str(BIN), os.environ["PATH"]])
    return {**os.environ, **ENVIRONMENT, "PATH": path, "RUNS": str(runs)}


def bash(
    script: str, *options: str, runs: Path, programs: tuple[Path, ...] = (), **knobs: str
) -> subprocess.CompletedProcess[str]:
    """Run a script."""
    path = FOLDER / script
    if not path.exists():
        path, knobs = path.with_name("scheme.sh"), {"SCHEME": path.stem, **knobs}
    return subprocess.run(
        ["bash", str(path), *options],
        env={**environment(runs, *programs), **knobs},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


# ---- What is done when, with fakes of the programs.

# A checkpoint is the number of updates and 100 KB.
FAKES = {
    "fairseq-train": r"""
while (($#)); do
    case $1 in --save-dir) save=$2 ;; --max-update) updates=$2 ;; --lr) lr=$2 ;; esac
    shift
done
[[ $lr != 1e20 ]] || { echo "FloatingPointError: gradients are Nan/Inf" && exit 1; }
mkdir -p "$save"
time="2026-11-23 10:00:0"
for ((i = 4; i <= updates; i += 4)); do
    values="\"num_updates\": \"$i\", \"loss\": \"9\", \"ups\": \"10\", \"wps\": \"100\""
    echo "$time$((i / 4)) | INFO | train_inner | {$values}"
    echo "$time$((i / 4)) | INFO | valid | {\"valid_loss\": \"5\", \"valid_num_updates\": \"$i\"}"
    { echo "$i" && head -c 100000 /dev/zero; } >"$save/checkpoint_1_$i.pt"
    cp "$save/checkpoint_1_$i.pt" "$save/checkpoint_last.pt"
done
""",
    "fairseq-generate": r"""
subwords=${1%/data-bin}/subwords
while (($#)); do
    case $1 in --results-path) results=$2 ;; --target-lang) target=$2 ;; esac
    shift
done
awk '{ print "H-" NR - 1 "\t-0.5\t" $0 }' "$subwords/test.$target" >"$results/generate-test.txt"
""",
    "fairseq-gradinit": r"""echo "fairseq-gradinit $*" """,
    "python3": r"""
case ${1##*/} in
    prepare.py) [[ -e $4 ]] || cp -r "$PREPARED" "$4" ;;
    resume.py) [[ -e $2/checkpoint_last.pt ]] && head -n 1 "$2/checkpoint_last.pt" || echo 0 ;;
    average_checkpoints.py) touch "${@: -1}" ;;
    run_record.py)
        [[ ! ${RECORDS:-} ]] || exec "$PYTHON" "$@"
        case $2 in
            begin) echo "$*" >"$3/about" ;;
            divergence) grep FloatingPointError "$3" ;;
            score) echo "scored" >>"${@: -1}" ;;
        esac
        ;;
esac
""",
}

Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of programs for PATH."""
    folder = tmp_path_factory.mktemp("fakes")
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\nset -euo pipefail\n{body}")
        (folder / name).chmod(0o755)
    return folder


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
    for name in ("train.idx", "train.bin"):
        (folder / "data-bin" / name).touch()
    write_manifest(folder, "1", lowercase=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "corpus": "numbers"}))
    return folder


@pytest.fixture(scope="module")
def smoke_with_fakes(fakes: Path, prepared: Path) -> Start:
    """Run a recipe with --smoke and fakes of what it starts."""

    def start(recipe: str, runs: Path, *first: Path, **knobs: str):
        known = {"PREPARED": str(prepared), "PYTHON": sys.executable}
        done = bash(
            f"{recipe}.sh", "--smoke", runs=runs, programs=(*first, fakes), **{**known, **knobs}
        )
        return done

    return start


@pytest.fixture
def smoke(smoke_with_fakes: Start, tmp_path: Path) -> Start:
    """The same in a folder of its own; it must end well."""

    def start(recipe: str, **knobs: str) -> str:
        done = smoke_with_fakes(recipe, tmp_path, **knobs)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return start


def test_finished_steps_are_skipped(smoke, tmp_path):
    steps = ("train", "average", "translate-test")
    first = smoke("multi30k/gradinit-adam")
    assert not any(f"{step}: done before" in first for step in steps)
    assert f"fairseq-gradinit table {tmp_path}/smoke/results.jsonl" in first
    again = smoke("multi30k/gradinit-adam")
    assert all(f"{step}: done before" in again for step in steps)


def test_translations_with_another_setting_are_made_again_and_nothing_else(smoke, tmp_path):
    smoke("multi30k/gradinit-adam")
    (log,) = tmp_path.glob("smoke/multi30k/gradinit-adam/*/seed-1/translate-test.log")
    log.write_text("a line that was cut")
    again = smoke("multi30k/gradinit-adam", LENPEN="0.5")
    assert "average: done before" in again
    assert "translate-test: done before" not in again
    assert log.read_text().startswith("a line that was cut\n")
    (about,) = tmp_path.glob("smoke/multi30k/gradinit-adam/*/seed-1/about")
    assert "lenpen 0.5" in about.read_text()


def test_machines_after_the_first_write_no_stamp(smoke, tmp_path):
    smoke("multi30k/pre-ln", STEPS="prepare")
    (stamp,) = tmp_path.glob("smoke/multi30k/pre-ln/*/seed-1/corpus.sha256")
    stamp.unlink()
    smoke("multi30k/pre-ln", STEPS="prepare train", NODE_RANK="1")
    assert {path.name for path in stamp.parent.iterdir()} == {
        *("about", "checkpoints", "lock", "train.node-1.log")
    }


def test_a_file_system_without_locks_is_named_and_used(smoke_with_fakes, tmp_path):
    (tmp_path / "first").mkdir()
    flock = tmp_path / "first" / "flock"
    # util-linux's, where the system call is not there.
    flock.write_text("#!/bin/sh\nexit 65\n")
    flock.chmod(0o755)
    done = smoke_with_fakes("multi30k/pre-ln", tmp_path, flock.parent, STEPS="prepare")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is on a file system without locks") == 2


def test_a_run_that_another_program_works_on_is_left_alone(smoke, smoke_with_fakes, tmp_path):
    smoke("multi30k/pre-ln", STEPS="prepare")
    (lock,) = tmp_path.glob("smoke/multi30k/pre-ln/*/seed-1/lock")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = smoke_with_fakes("multi30k/pre-ln", tmp_path, STEPS="prepare")
    assert done.returncode == 1
    assert "another program is at work in " in done.stderr


def test_a_full_disk_is_named_and_nothing_half_written_is_believed(
    smoke, smoke_with_fakes, disk, tmp_path
):
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke/multi30k").symlink_to(disk.folder)
    disk.fill()
    done = smoke_with_fakes("multi30k/pre-ln", tmp_path, STEPS="prepare")
    assert done.returncode == 1
    assert "corpus.sha256 cannot be written: make room on its disk" in done.stderr
    disk.fill(leave=64)
    smoke("multi30k/pre-ln", STEPS="prepare")
    done = smoke_with_fakes("multi30k/pre-ln", tmp_path, STEPS="train")
    assert done.returncode == 1
    assert "train failed: there is no room left in " in done.stderr
    assert not list(disk.folder.rglob("train.done"))


def test_a_kill_after_the_last_checkpoint_adds_no_update(smoke, tmp_path):
    smoke("multi30k/pre-ln", STEPS="prepare train")
    (stamp,) = tmp_path.glob("smoke/multi30k/pre-ln/*/seed-1/train.done")
    log = stamp.with_name("train.log").read_text()
    stamp.unlink()
    assert "train: done before" in smoke("multi30k/pre-ln", STEPS="prepare train")
    assert stamp.exists()
    assert stamp.with_name("train.log").read_text() == log


def test_another_corpus_under_a_run_is_refused(smoke, smoke_with_fakes, tmp_path):
    smoke("multi30k/pre-ln", STEPS="prepare")
    (tmp_path / "smoke/data/numbers/data-bin/train.bin").write_text("other")
    done = smoke_with_fakes("multi30k/pre-ln", tmp_path, STEPS="train")
    assert done.returncode == 1
    assert "is another one than when" in done.stderr
    assert not list(tmp_path.rglob("train.log"))


def test_a_run_that_diverges_is_a_result(smoke, tmp_path):
    knobs = {"LR": "1e20", "SEEDS": "1"}
    first = smoke("multi30k/default-no-warmup", **knobs)
    assert "diverged: FloatingPointError: gradients are Nan/Inf" in first
    assert "fairseq-generate" not in first
    (reason,) = tmp_path.glob("smoke/multi30k/default-no-warmup/*/seed-1/diverged")
    assert reason.read_text() == "FloatingPointError: gradients are Nan/Inf"
    assert "train: done before" in smoke("multi30k/default-no-warmup", **knobs)


def test_several_processes_train_as_one_batch(smoke, tmp_path):
    smoke("multi30k/gradinit-adam", LAUNCH="launch/gloo.sh", WORKERS="2")
    (about,) = tmp_path.glob("smoke/multi30k/gradinit-adam/*/seed-1/about")
    assert "--workers 2 --batch-tokens 1000 " in about.read_text()


def test_a_sweep_ends_in_a_table_and_a_picture(fakes, prepared, tmp_path):
    knobs = {"LRS": "1e-3 1e20", "BETA2S": "0.98", "RECIPES": "multi30k/default-no-warmup"}
    knobs |= {"PREPARED": str(prepared)}
    done = bash("sweep.sh", "--smoke", runs=tmp_path, programs=(fakes,), JOBS="2", **knobs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("smoke/multi30k/default-no-warmup/*/seed-1/train.done"))) == 2
    assert len(list(tmp_path.glob("smoke/multi30k/default-no-warmup/*/seed-1/diverged"))) == 1
    results = tmp_path / "smoke/results.jsonl"
    assert f"\nfairseq-gradinit table {results} " in done.stdout
    picture = tmp_path / "heat-map.png"
    assert f"\nfairseq-gradinit heat-map {results} --out {picture}\n" in done.stdout


def test_points_of_a_sweep(tmp_path):
    knobs = {"LRS": "1e-3 1e20", "BETA2S": "0.98", "RECIPES": "multi30k/default-no-warmup"}
    assert bash("sweep.sh", "--count", runs=tmp_path, **knobs).stdout.strip() == "2"
    # SGD has no beta2.
    sgd = {**knobs, "BETA2S": "0.9 0.98", "RECIPES": "multi30k/default-sgd multi30k/pre-ln"}
    assert bash("sweep.sh", "--count", runs=tmp_path, **sgd).stdout.strip() == "6"
    mistyped = bash("sweep.sh", "--dryrun", runs=tmp_path, **knobs)
    assert (mistyped.returncode, mistyped.stdout) == (2, "")
    assert "--dryrun is no option" in mistyped.stderr
    array = bash("sweep.sh", "--dry-run", runs=tmp_path, SLURM_ARRAY_TASK_ID="1", **knobs)
    assert "--lr 1e20 " in array.stdout
    assert "--lr 1e-3 " not in array.stdout


# ---- Records of runs.


@pytest.fixture(scope="module")
def recorded(smoke_with_fakes: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two runs, of which the first is the other's baseline."""
    runs = tmp_path_factory.mktemp("recorded")
    for arm in ("default-warmup", "gradinit-adam"):
        done = smoke_with_fakes(f"multi30k/{arm}", runs, RECORDS="1")
        assert done.returncode == 0, done.stdout + done.stderr
    return runs / "smoke"


@pytest.fixture
def copied(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the second run, for changes, beside the first one."""
    shutil.copytree(recorded / "multi30k", tmp_path / "multi30k")
    (run,) = tmp_path.glob("multi30k/gradinit-adam/*/seed-1")
    return run


def test_records_of_finished_runs(recorded):
    baseline, run = read_runs([recorded / "results.jsonl"])
    assert (baseline.recipe, baseline.comparison) == ("multi30k/default-warmup", None)
    assert run.comparison.baseline == "multi30k/default-warmup"
    assert (run.status, run.corpus, run.settings.updates) == ("finished", "numbers", 12)
    assert [(part.name, part.bleu) for part in run.scores] == [("test", pytest.approx(100))]
    assert run.scores[0].tokenised_bleu == pytest.approx(100)
    assert run.valid == ((4, 5.0), (8, 5.0), (12, 5.0))
    # No folder of this machine.
    assert run.commands[0].startswith("fairseq-train numbers/data-bin ")
    assert run.commands[0].endswith(" --save-dir checkpoints")


def test_a_run_scored_again_is_kept_once(recorded, copied, tmp_path):
    results = Path(shutil.copy(recorded / "results.jsonl", tmp_path))
    before = results.read_bytes()
    assert run_record.main(["score", str(copied), "--results", str(results)]) == 0
    assert results.read_bytes() == before


def test_a_baseline_that_is_not_translated_yet_is_none(copied):
    assert run_record.record(copied).comparison is not None
    (stamp,) = copied.parents[2].glob("default-warmup/*/seed-1/translate-test.done")
    stamp.unlink()
    assert run_record.record(copied).comparison is None


def test_a_run_that_was_decoded_otherwise_has_no_baseline(copied):
    about = run_record.About.read(copied)
    decoding = tuple(word.replace("lenpen 1", "lenpen 0.5") for word in about.decoding)
    assert decoding != about.decoding
    run_record.begin(copied, replace(about, decoding=decoding))
    run = run_record.record(copied)
    assert "--lenpen 0.5" in run.settings.options
    assert run.comparison is None


def test_the_record_of_a_diverged_run_has_no_scores(copied):
    (copied / "diverged").write_text("FloatingPointError: it did")
    run = run_record.record(copied)
    assert (run.status, run.reason) == ("diverged", "FloatingPointError: it did")
    assert (run.valid_loss, run.scores, run.comparison) == (None, (), None)


def test_scoring_an_unfinished_run_is_refused(copied, tmp_path, capsys):
    lines = (copied / "train.log").read_text().splitlines()
    kept = [line for line in lines if '"valid_num_updates": "12"' not in line]
    (copied / "train.log").write_text("\n".join(kept))
    results = tmp_path / "results.jsonl"
    assert run_record.main(["score", str(copied), "--results", str(results)]) == 1
    assert "after 8 of 12 updates; give the recipe again" in capsys.readouterr().err
    assert not results.exists()
    assert run_record.main(["score", str(tmp_path), "--results", str(results)]) == 1
    assert "is no run of a recipe" in capsys.readouterr().err


def test_a_broken_checkpoint_without_another_is_refused(tmp_path, capsys):
    (tmp_path / "checkpoint_last.pt").write_bytes(b"PK")
    assert resume.main([str(tmp_path)]) == 1
    assert "no other checkpoint is there to go on from: remove it" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_is_kept(tmp_path, capsys):
    (tmp_path / "checkpoint_last.pt").mkdir()
    torch.save({"optimizer_history": [{"num_updates": 4}]}, tmp_path / "checkpoint_1_4.pt")
    assert resume.main([str(tmp_path)]) == 1
    assert "checkpoint_last.pt: Is a directory" in capsys.readouterr().err
    assert (tmp_path / "checkpoint_last.pt").is_dir()


def test_a_broken_checkpoint_is_not_averaged(tmp_path, capsys):
    good, bad = (tmp_path / f"checkpoint_1_{update}.pt" for update in (4, 8))
    torch.save({"model": {"weight": torch.ones(3)}}, good)
    bad.write_bytes(good.read_bytes()[:-30])
    output = tmp_path / "average.pt"
    assert average_checkpoints.main([str(tmp_path), "--last", "2", "--output", str(output)]) == 1
    assert f"{bad} is broken: remove it, and average others" in capsys.readouterr().err
    assert not output.exists()


# ---- The commands.


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
def test_mistakes_are_refused_in_one_sentence(tmp_path, knobs, message):
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


def test_max_tokens_does_not_change_the_batch(tmp_path):
    done = bash("multi30k/pre-ln.sh", "--dry-run", runs=tmp_path, MAX_TOKENS="500", SEEDS="1")
    assert "--max-tokens 500 --update-freq 2 " in done.stdout


# ---- The real programs.


@pytest.mark.slow
def test_scripts_are_clean_for_shellcheck():
    scripts = sorted(map(str, FOLDER.rglob("*.sh")))
    assert len(scripts) > len(RECIPES)
    # The analysis of the flow of data would take most of the time.
    words = [BIN / "shellcheck", "-x", "--extended-analysis=false", *scripts]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a whole smoke run lies, with its corpus."""
    runs = tmp_path_factory.mktemp("runs")
    done = bash("multi30k/gradinit-adam.sh", "--smoke", runs=runs)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = read_runs([runs / "smoke/results.jsonl"])
    assert f"| {run.title}" in done.stdout
    return runs


@pytest.mark.slow
def test_a_whole_smoke_run(whole):
    (run,) = read_runs([whole / "smoke/results.jsonl"])
    assert (run.status, run.corpus, run.settings.updates) == ("finished", "numbers", 12)
    assert [part.name for part in run.scores] == ["test"]
    assert run.scores[0].tokenised_bleu is not None
    assert run.gradinit_seconds is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "knobs"),
    [
        ("libreoffice/gradinit-sgd", {}),
        ("iwslt14_de_en/default-warmup", {}),
        ("wmt14_en_de/pre-ln", {"LAUNCH": "launch/gloo.sh", "WORKERS": "2"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_of_each_other_corpus_trains(whole, recipe, knobs):
    done = bash(f"{recipe}.sh", "--smoke", runs=whole, STEPS="prepare train", **knobs)
    assert done.returncode == 0, done.stdout + done.stderr
    (stamp,) = whole.glob(f"smoke/{recipe}/*/seed-1/train.done")
    assert TrainingLog.read(stamp.with_name("train.log")).valid[-1][0] == 12


def kill_when(runs: Path, reached: Callable[[Path], bool]) -> None:
    """Start a recipe, and kill it once its run has reached a state."""
    with subprocess.Popen(
        ["bash", str(FOLDER / "multi30k/gradinit-adam.sh"), "--smoke"],
        env=environment(runs),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        while not any(map(reached, runs.glob("smoke/multi30k/gradinit-adam/*/seed-1"))):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    for lock in runs.glob("smoke/multi30k/gradinit-adam/*/seed-1/lock"):
        with lock.open() as file:
            # All that the recipe has started hold it until they are gone.
            fcntl.flock(file, fcntl.LOCK_EX)


@pytest.mark.slow
def test_a_recipe_killed_while_it_learns_trains_and_translates_ends_with_the_same_scores(
    whole, tmp_path
):
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke/data").symlink_to(whole / "smoke/data")

    def learns(run: Path) -> bool:
        log = run / "train.log"
        return log.exists() and "GradInit: learning" in log.read_text()

    def trains(run: Path) -> bool:
        return any(run.glob("checkpoints/checkpoint_1_*.pt"))

    def translates(run: Path) -> bool:
        log = run / "translate-test.log"
        return log.exists() and log.stat().st_size > 0

    for reached in (learns, trains, translates):
        kill_when(tmp_path, reached)
    done = bash("multi30k/gradinit-adam.sh", "--smoke", runs=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: done before" in done.stdout
    (broken,) = read_runs([tmp_path / "smoke/results.jsonl"])
    (unbroken,) = read_runs([whole / "smoke/results.jsonl"])
    assert broken.settings == unbroken.settings
    assert broken.valid == unbroken.valid
    assert broken.scores == unbroken.scores
