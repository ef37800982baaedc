"""Several processes of fairseq-train, started by the scripts in recipes/launch/."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import BIN, ENVIRONMENT, ROOT, Outcome
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed.utils import infer_init_method
from omegaconf import DictConfig, OmegaConf

TRAIN = ["fairseq-train", "a corpus", "--adam-betas", "(0.9, 0.98)"]

# Stands for fairseq-train; the rank is the last of its arguments.
RANK_PROGRAM = """
rank=${!#}
case $1 in
    rank-fails) ((rank == $2)) && { echo "rank $rank is broken"; exit 3; } ;;
    deaf) ((rank == 1)) && exit 3; trap '' TERM ;;
    signals) trap "touch $2/got-$rank; exit 143" TERM; touch "$2/ready-$rank" ;;
esac
while :; do sleep 0.1; done
"""


def environment(variables: Mapping[str, object], *programs: Path) -> dict[str, str]:
    """What a script runs in: programs of ours before all others, nothing left of a scheduler."""
    path = os.pathsep.join([*map(str, programs), str(BIN), os.environ["PATH"]])
    inherited = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    given = {name: str(value) for name, value in variables.items()}
    light = {name: ENVIRONMENT[name] for name in ("PYTHONPATH", "PYTHONWARNINGS")}
    return {**inherited, **light, "PATH": path, **given}


def launch(script: str, words: Sequence[object], *programs: Path, **variables: object) -> Outcome:
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / "launch" / script), *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(variables, *programs),
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout + done.stderr)


def commands(dry_run: Outcome) -> list[list[str]]:
    """The command lines that a dry run prints."""
    assert dry_run.code == 0, dry_run.output
    return [shlex.split(line) for line in dry_run.output.splitlines()]


def value(words: Sequence[str], option: str) -> str:
    assert words.count(option) == 1, words
    return words[words.index(option) + 1]


def rank_program(*arguments: object) -> list[str]:
    return ["bash", "-c", RANK_PROGRAM, "program", *map(str, arguments)]


# ---- gloo.sh


@pytest.mark.parametrize("broken", [0, 2])
def test_a_rank_that_fails_ends_the_others(broken, tmp_path) -> None:
    program = rank_program("rank-fails", broken)
    done = launch("gloo.sh", program, TMPDIR=tmp_path, WORKERS=3)
    assert done.code == 3
    assert done.output.count(f"rank {broken} is broken") == 1
    told = f"gloo.sh: rank {broken} of 3 failed with exit status 3:" in done.output
    assert told == (broken > 0)
    assert not list(tmp_path.glob("gloo.*"))


def test_a_rank_that_does_not_end_is_killed() -> None:
    done = launch("gloo.sh", rank_program("deaf"), WORKERS=2, GRACE=1)
    assert done.code == 3


def test_a_signal_reaches_every_rank(tmp_path) -> None:
    words = ["bash", str(ROOT / "recipes/launch/gloo.sh"), *rank_program("signals", tmp_path)]
    with subprocess.Popen(words, env=environment({"WORKERS": 3})) as process:
        while len(list(tmp_path.glob("ready-*"))) < 3:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
    assert len(list(tmp_path.glob("got-*"))) == 3


def test_a_dry_run_of_gloo_prints_a_command_for_each_rank() -> None:
    found = commands(launch("gloo.sh", TRAIN, WORKERS=3, DRY_RUN=1))
    assert [value(words, "--distributed-rank") for words in found] == ["0", "1", "2"]
    for words in found:
        assert words[: len(TRAIN) + 2] == ["env", "CUDA_VISIBLE_DEVICES=", *TRAIN]
        assert value(words, "--distributed-world-size") == "3"
        assert value(words, "--distributed-backend") == "gloo"
        assert value(words, "--ddp-backend") == "legacy_ddp"
        meeting = value(words, "--distributed-init-method")
        assert meeting == value(found[0], "--distributed-init-method")
        assert meeting.startswith("file:///")


# ---- torchrun.sh and srun.sh


@dataclass(frozen=True)
class Place:
    """What fairseq makes of the environment and the options that a process is started with."""

    rank: int
    world_size: int
    device: int
    meeting: str
    starts_more: bool


@pytest.fixture
def place_of(monkeypatch) -> Iterator:
    def place(words: Sequence[str], variables: Mapping[str, object], visible_gpus: int) -> Place:
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if "SLURM" in name]:
                patch.delenv(name)
            for name, text in variables.items():
                patch.setenv(name, str(text))
            patch.setattr(torch.cuda, "device_count", lambda: visible_gpus)
            patch.setattr(torch.cuda, "set_device", lambda device: None)
            cfg: DictConfig = OmegaConf.structured(FairseqConfig).distributed_training
            cfg.distributed_world_size = int(value(words, "--distributed-world-size"))
            if "--distributed-port" in words:
                cfg.distributed_port = int(value(words, "--distributed-port"))
            infer_init_method(cfg)
        return Place(
            cfg.distributed_rank,
            cfg.distributed_world_size,
            cfg.device_id,
            cfg.distributed_init_method,
            not cfg.distributed_no_spawn,
        )

    return place


@dataclass(frozen=True)
class Fake:
    """A program on PATH that writes down how it was called.

    Attributes:
        folder: where it lies.
    """

    folder: Path

    @classmethod
    def make(cls, folder: Path, name: str, body: str = "") -> Fake:
        folder.mkdir(exist_ok=True)
        record = f'printf "%s\\0" "$@" >{folder}/words\nenv -0 >{folder}/environment\n'
        (folder / name).write_text(f"#!/bin/sh\n{body or record}exit ${{EXIT:-0}}\n")
        (folder / name).chmod(stat.S_IRWXU)
        return cls(folder)

    def words(self) -> list[str]:
        return (self.folder / "words").read_text().split("\0")[:-1]

    def environment(self) -> dict[str, str]:
        pairs = (self.folder / "environment").read_text().split("\0")[:-1]
        return dict(pair.split("=", 1) for pair in pairs)


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 4), (2, 1), (2, 8)])
def test_processes_of_torchrun_are_one_run_with_a_gpu_each(nodes, gpus, tmp_path, place_of):
    fake = Fake.make(tmp_path, "torchrun")
    several = {"NODES": nodes, "MASTER_ADDR": "first", "MASTER_PORT": 1234}
    places = []
    for node in range(nodes):
        variables = {**several, "NODE_RANK": node, "GPUS_PER_NODE": gpus}
        done = launch("torchrun.sh", TRAIN, tmp_path, **variables)
        assert done.code == 0, done.output
        words = fake.words()
        assert value(words, "--nproc-per-node") == str(gpus)
        begin = words.index("--no-python") + 1
        assert words[begin : begin + len(TRAIN)] == TRAIN
        if nodes > 1:
            meeting = [value(words, f"--master-{part}") for part in ("addr", "port")]
            assert [value(words, "--nnodes"), value(words, "--node-rank")] == [
                str(nodes),
                str(node),
            ]
            assert meeting == ["first", "1234"]
        else:
            assert "--standalone" in words
        for local in range(gpus):
            given = {"MASTER_ADDR": "first", "MASTER_PORT": 1234, "WORLD_SIZE": nodes * gpus}
            places.append(place_of(words, {**given, "RANK": node * gpus + local}, gpus))
    assert places == [
        Place(rank, nodes * gpus, rank % gpus, "env://", False) for rank in range(nodes * gpus)
    ]


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 4), (2, 2), (2, 8)])
def test_tasks_of_srun_are_one_run_with_a_gpu_each(nodes, gpus, tmp_path, place_of, monkeypatch):
    fake = Fake.make(tmp_path, "srun")
    torchrun = dict.fromkeys(("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"), "24000")
    allocation = {
        **{"SLURM_JOB_ID": 1, "SLURM_JOB_NUM_NODES": nodes, "SLURM_GPUS_ON_NODE": gpus},
        "SLURM_CPUS_PER_TASK": 6,
    }
    done = launch("srun.sh", TRAIN, tmp_path, **torchrun, **allocation)
    assert done.code == 0, done.output
    words = fake.words()
    for option, number in {
        **{"--nodes": nodes, "--ntasks": nodes * gpus, "--ntasks-per-node": gpus},
        **{"--cpus-per-task": 6, "--distributed-port": 24000},
    }.items():
        assert value(words, option) == str(number)
    assert {"--kill-on-bad-exit=1", "--gpu-bind=none"} < set(words)
    Fake.make(tmp_path, "scontrol", "for n in 0 1 2; do echo node$n; done\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    kept = {name: text for name, text in fake.environment().items() if name in torchrun}
    step = {"SLURM_STEP_NODELIST": "node[0-2]", "SLURM_NNODES": nodes}
    places = [
        place_of(
            words,
            {
                **{**kept, **step, "SLURM_NTASKS_PER_NODE": gpus, "SLURM_PROCID": rank},
                **{"SLURM_LOCALID": rank % gpus, "SLURM_NODEID": rank // gpus},
            },
            gpus,
        )
        for rank in range(nodes * gpus)
    ]
    assert places == [
        Place(rank, nodes * gpus, rank % gpus, "tcp://node0:24000", False)
        for rank in range(nodes * gpus)
    ]


def test_one_task_a_node_finds_the_others_too(tmp_path, place_of, monkeypatch) -> None:
    """fairseq then starts the processes of a node itself, one for each GPU that it sees."""
    allocation = {"SLURM_JOB_ID": 3, "NODES": 3, "GPUS_PER_NODE": 1, "DRY_RUN": 1}
    (words,) = commands(launch("srun.sh", TRAIN, **allocation))
    assert value(words, "--distributed-port") == "20003"
    Fake.make(tmp_path, "scontrol", "echo node0\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    step = {"SLURM_STEP_NODELIST": "x", "SLURM_NNODES": 3, "SLURM_NTASKS_PER_NODE": 1}
    places = [place_of(words, {**step, "SLURM_NODEID": node}, 1) for node in range(3)]
    assert [(p.rank, p.world_size, p.starts_more) for p in places] == [
        (node, 3, True) for node in range(3)
    ]


@pytest.mark.parametrize(("script", "program"), [("torchrun.sh", "torchrun"), ("srun.sh", "srun")])
def test_a_dry_run_prints_what_would_be_run(script, program, tmp_path) -> None:
    fake = Fake.make(tmp_path, program)
    allocation = {"GPUS_PER_NODE": 2, "SLURM_JOB_ID": 3, "SRUN_OPTIONS": "--qos high"}
    (printed,) = commands(launch(script, TRAIN, tmp_path, **allocation, DRY_RUN=1))
    assert not (tmp_path / "words").exists()
    done = launch(script, TRAIN, tmp_path, **allocation, EXIT=5)
    assert done.code == 5
    assert printed[printed.index(program) + 1 :] == fake.words()
    assert fake.environment()["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_torchrun_ends_all_processes_when_one_fails() -> None:
    command = ["bash", "-c", "((RANK == 1)) && exit 3; sleep 300", "program"]
    done = launch("torchrun.sh", command, GPUS_PER_NODE=2)
    assert done.code != 0


@pytest.mark.parametrize(
    ("script", "words", "variables", "sentence"),
    [
        ("gloo.sh", [], {}, "gloo.sh: no command: give it a fairseq-train command line"),
        ("gloo.sh", TRAIN, {"WORKERS": 0}, "gloo.sh: WORKERS=0: there must be at least one"),
        ("torchrun.sh", TRAIN, {"GPUS_PER_NODE": 0}, "on a machine without GPUs use gloo.sh"),
        ("torchrun.sh", TRAIN, {"GPUS_PER_NODE": 8, "NODES": 2}, "MASTER_ADDR is not set"),
        ("srun.sh", TRAIN, {"GPUS_PER_NODE": 8}, "srun.sh: there is no allocation"),
        ("srun.sh", TRAIN, {"SLURM_JOB_ID": 1}, "ask Slurm for GPUs"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(script, words, variables, sentence, tmp_path) -> None:
    programs = Fake.make(tmp_path, "nvidia-smi", "true\n").folder
    done = launch(script, words, programs, **variables)
    assert done.code == 1
    assert len(done.output.splitlines()) == 1
    assert sentence in done.output
