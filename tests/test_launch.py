"""Several processes of fairseq-train, started by the scripts in recipes/launch/."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

import pytest
import torch
from conftest import BIN, ENVIRONMENT, ROOT, Outcome
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed.utils import infer_init_method
from omegaconf import OmegaConf

TRAIN = ["fairseq-train", "a corpus", "--adam-betas", "(0.9, 0.98)"]

# Stands for fairseq-train; the rank is the last of its arguments.
RANK_PROGRAM = """
rank=${!#}
case $1 in
    rank-fails) ((rank == 2)) && { echo "rank $rank is broken"; exit 3; } ;;
    signals) trap "touch $2/got-$rank; exit 143" TERM; touch "$2/ready-$rank" ;;
esac
while :; do sleep 0.1; done
"""


def environment(variables: Mapping[str, object]) -> dict[str, str]:
    """What a script runs in: nothing is left of a scheduler."""
    inherited = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return {**inherited, **ENVIRONMENT, **path, **{n: str(v) for n, v in variables.items()}}


def launch(script: str, words: Sequence[object], **variables: object) -> Outcome:
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / "launch" / script), *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(variables),
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout + done.stderr)


def commands(script: str, **variables: object) -> list[list[str]]:
    """The command lines that a dry run prints."""
    dry_run = launch(script, TRAIN, **variables, DRY_RUN=1)
    assert dry_run.code == 0, dry_run.output
    return [shlex.split(line) for line in dry_run.output.splitlines()]


def value(words: Sequence[str], option: str) -> str:
    assert words.count(option) == 1, words
    return words[words.index(option) + 1]


def rank_program(*arguments: object) -> list[str]:
    return ["bash", "-c", RANK_PROGRAM, "program", *map(str, arguments)]


# ---- gloo.sh


def test_a_rank_that_fails_ends_the_others(tmp_path) -> None:
    done = launch("gloo.sh", rank_program("rank-fails"), TMPDIR=tmp_path, WORKERS=3)
    assert done.code == 3
    assert done.output.count("rank 2 is broken") == 1
    assert "gloo.sh: rank 2 of 3 failed with exit status 3:" in done.output
    assert not list(tmp_path.glob("gloo.*"))


def test_a_signal_reaches_every_rank(tmp_path) -> None:
    words = ["bash", str(ROOT / "recipes/launch/gloo.sh"), *rank_program("signals", tmp_path)]
    with subprocess.Popen(words, env=environment({"WORKERS": 3})) as process:
        while len(list(tmp_path.glob("ready-*"))) < 3:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
    assert len(list(tmp_path.glob("got-*"))) == 3


def test_a_dry_run_of_gloo_prints_a_command_for_each_rank() -> None:
    found = commands("gloo.sh", WORKERS=3)
    assert [value(words, "--distributed-rank") for words in found] == ["0", "1", "2"]
    assert len({value(words, "--distributed-init-method") for words in found}) == 1
    for words in found:
        assert words[: len(TRAIN) + 2] == ["env", "CUDA_VISIBLE_DEVICES=", *TRAIN]
        assert value(words, "--distributed-world-size") == "3"
        assert value(words, "--distributed-backend") == "gloo"
        assert value(words, "--ddp-backend") == "legacy_ddp"


# ---- torchrun.sh and srun.sh


@pytest.fixture
def place_of(monkeypatch):
    """What fairseq makes of the environment and the options that a process is started with."""

    def place(words: Sequence[str], variables: Mapping[str, object], gpus: int) -> tuple:
        for name, text in variables.items():
            monkeypatch.setenv(name, str(text))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        # scontrol's answer.
        monkeypatch.setattr(subprocess, "check_output", lambda words: b"node0\nnode1\n")
        cfg = OmegaConf.structured(FairseqConfig).distributed_training
        cfg.distributed_world_size = int(value(words, "--distributed-world-size"))
        if "--distributed-port" in words:
            cfg.distributed_port = int(value(words, "--distributed-port"))
        infer_init_method(cfg)
        assert cfg.distributed_no_spawn
        return (
            cfg.distributed_rank,
            cfg.distributed_world_size,
            cfg.device_id,
            cfg.distributed_init_method,
        )

    return place


@pytest.mark.parametrize("nodes", [1, 2])
def test_processes_of_torchrun_are_one_run_with_a_gpu_each(nodes, place_of):
    places = []
    for node in range(nodes):
        several = {"NODES": nodes, "NODE_RANK": node, "MASTER_ADDR": "first", "MASTER_PORT": 1234}
        (words,) = commands("torchrun.sh", GPUS_PER_NODE=4, **several)
        assert value(words, "--nproc-per-node") == "4"
        begin = words.index("--no-python") + 1
        assert words[begin : begin + len(TRAIN)] == TRAIN
        if nodes > 1:
            meeting = [value(words, f"--master-{part}") for part in ("addr", "port")]
            assert meeting == ["first", "1234"]
            assert [value(words, "--nnodes"), value(words, "--node-rank")] == ["2", str(node)]
        else:
            assert "--standalone" in words
        for rank in range(4 * node, 4 * node + 4):
            places.append(place_of(words, {**several, "WORLD_SIZE": 4 * nodes, "RANK": rank}, 4))
    assert places == [(rank, 4 * nodes, rank % 4, "env://") for rank in range(4 * nodes)]


def test_tasks_of_srun_are_one_run_with_a_gpu_each(place_of, monkeypatch):
    allocation = {"SLURM_JOB_ID": 3, "SLURM_JOB_NUM_NODES": 2, "SLURM_GPUS_ON_NODE": 4}
    (words,) = commands("srun.sh", **allocation, SRUN_OPTIONS="--qos high")
    expected = {"--nodes": "2", "--ntasks": "8", "--ntasks-per-node": "4", "--qos": "high"}
    for option, text in expected.items():
        assert value(words, option) == text
    assert {"--kill-on-bad-exit=1", "--gpu-bind=none"} < set(words)
    # Of torchrun, whose variables fairseq would believe before those of Slurm.
    assert words[:5] == ["env", "-u", "RANK", "-u", "WORLD_SIZE"]
    monkeypatch.delenv("RANK", raising=False)
    step = {"SLURM_STEP_NODELIST": "node[0-1]", "SLURM_NNODES": 2, "SLURM_NTASKS_PER_NODE": 4}
    for rank in range(8):
        task = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % 4, "SLURM_NODEID": rank // 4}
        assert place_of(words, {**step, **task}, 4) == (rank, 8, rank % 4, "tcp://node0:20003")


@pytest.mark.parametrize(
    ("script", "words", "variables", "sentence"),
    [
        ("gloo.sh", [], {}, "gloo.sh: no command: give it a fairseq-train command line"),
        ("torchrun.sh", TRAIN, {"GPUS_PER_NODE": 0}, "on a machine without GPUs use gloo.sh"),
        ("torchrun.sh", TRAIN, {"GPUS_PER_NODE": 8, "NODES": 2}, "MASTER_ADDR is not set"),
        ("srun.sh", TRAIN, {"GPUS_PER_NODE": 8}, "srun.sh: there is no allocation"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(script, words, variables, sentence) -> None:
    done = launch(script, words, **variables)
    assert done.code == 1
    assert len(done.output.splitlines()) == 1
    assert sentence in done.output
