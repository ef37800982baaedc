"""Ranks of fairseq-train of which one is killed, stalls, or is not like the others.

Each expects an error of all ranks, and that the same command then goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OWN_USER_DIR, ROOT, Corpus, Outcome, usual_options

import fairseq_gradinit
from fairseq_gradinit.scales import Scales

ITERATIONS = 7
BASE = usual_options("--max-update", "--criterion", "--label-smoothing")
LEARNING = [
    *("--user-dir", str(ROOT / "tests" / "faulty_user_dir")),
    *("--gradinit", "--gradinit-iterations", str(ITERATIONS), "--gradinit-save-interval", "1"),
    *("--criterion", "cross_entropy", "--max-update", "2"),
    *("--encoder-layers", "1", "--decoder-layers", "1"),
]


@dataclass(frozen=True)
class Run:
    """One command as several processes.

    Attributes:
        data, save_dir: of the command.
        processes: how many.
        harm: of a rank, what its environment has in addition; see faulty_user_dir.
        options: of a rank, what its command has in addition.
        copies: of a rank, where its own copy of the data is.
    """

    data: Path
    save_dir: Path
    processes: int = 2
    harm: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    options: Mapping[int, Sequence[str]] = field(default_factory=dict)
    copies: Mapping[int, Path] = field(default_factory=dict)

    def ranks(self) -> list[dict]:
        """What forked_ranks.py starts."""
        self.save_dir.mkdir(exist_ok=True)
        meeting = self.save_dir / "meeting"
        meeting.unlink(missing_ok=True)
        return [
            {
                "words": [
                    *("fairseq-train", str(self.copies.get(rank, self.data)), *BASE, *LEARNING),
                    *("--save-dir", str(self.save_dir), "--ddp-backend", "legacy_ddp"),
                    *("--distributed-world-size", str(self.processes), "--distributed-no-spawn"),
                    *("--distributed-rank", str(rank), "--distributed-backend", "gloo"),
                    *("--distributed-init-method", f"file://{meeting}"),
                    *self.options.get(rank, ()),
                ],
                "environment": {k: str(v) for k, v in self.harm.get(rank, {}).items()},
                "log": str(self.log(rank)),
            }
            for rank in range(self.processes)
        ]

    def log(self, rank: int) -> Path:
        return self.save_dir / f"log.{rank}"


Start = Callable[..., list[list[Outcome]]]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start runs side by side, and wait for what each of their ranks comes to."""
    program = str(Path(__file__).with_name("forked_ranks.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, program],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL},
        text=True,
        cwd="/",
        env=environment,
    ) as server:

        def start_runs(*runs: Run) -> list[list[Outcome]]:
            for run in runs:
                for log in run.save_dir.glob("log.*"):
                    log.unlink()
            job = {"ranks": [rank for run in runs for rank in run.ranks()], "limit": 250.0}
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            codes = iter(json.loads(server.stdout.readline()))
            return [
                [Outcome(next(codes), run.log(rank).read_text()) for rank in range(run.processes)]
                for run in runs
            ]

        yield start_runs
        server.stdin.close()


# ---- one rank is killed, or stalls

# Collectives of a run from its beginning: 1 for the snapshot, 5 for the LayerNorms, 1 that compares
# the weights, 5 an iteration. A run that goes on from a state has one more before its iterations.
PATIENCE = 15.0
HARM = [
    {2: {1: {"KILLED_AT": 4}}, 3: {2: {"KILLED_AT": 7}}},
    {2: {0: {"KILLED_AT": 15}}, 3: {1: {"KILLED_AT": 21}}},
    {2: {1: {"STOPPED_AT": 17}}, 3: {0: {"STOPPED_AT": 15}}},
    {2: {1: {"KILLED_AT": 20}}, 3: {0: {"KILLED_AT": 21}}},
]


@dataclass(frozen=True)
class Chain:
    """A run that was broken again and again, and one that was not.

    Attributes:
        broken: what the ranks came to each time, and the number of the one that was harmed.
        scales_early: whether there were scales after any of these.
        whole: of the command given for the last time.
        folder, unbroken: the --save-dir of this run, and of one that was not broken.
        outcome: of the latter.
    """

    broken: list[tuple[list[Outcome], int]]
    scales_early: bool
    whole: list[Outcome]
    folder: Path
    unbroken: Path
    outcome: list[Outcome]


@pytest.fixture(scope="module")
def chains(corpus: Corpus, start: Start, tmp_path_factory) -> dict[int, Chain]:
    base = tmp_path_factory.mktemp("chains")
    folders = {count: base / f"broken-{count}" for count in (2, 3)}
    broken: dict[int, list] = {count: [] for count in folders}
    early = dict.fromkeys(folders, False)
    for harms in HARM:
        patience = {"PATIENCE": PATIENCE} if "STOPPED_AT" in str(harms) else {}
        runs = []
        for count, folder in folders.items():
            harm = {rank: {**patience, **harms[count].get(rank, {})} for rank in range(count)}
            runs.append(Run(corpus.translation, folder, count, harm))
        for count, outcomes in zip(folders, start(*runs), strict=True):
            broken[count].append((outcomes, *harms[count]))
            early[count] |= (folders[count] / "gradinit_scales.json").exists()
    unbroken = {count: base / f"unbroken-{count}" for count in folders}
    every = [*folders.values(), *unbroken.values()]
    ended = start(*(Run(corpus.translation, folder, int(folder.name[-1])) for folder in every))
    return {
        count: Chain(
            broken[count], early[count], ended[i], folders[count], unbroken[count], ended[i + 2]
        )
        for i, count in enumerate(folders)
    }


@pytest.mark.parametrize("processes", [2, 3])
def test_a_rank_that_is_killed_or_stalls_ends_the_others_with_a_sentence(processes, chains):
    for (outcomes, harmed), harm in zip(chains[processes].broken, HARM, strict=True):
        ((kind, _),) = harm[processes][harmed].items()
        for rank, outcome in enumerate(outcomes):
            if rank == harmed and kind == "KILLED_AT":
                assert outcome.code == -signal.SIGKILL
                continue
            # One that was stopped goes on when the others have ended, and finds them gone.
            assert outcome.code == 1
            assert f"process {rank} of {processes} lost the others in all_reduce" in outcome.error()
        if kind == "STOPPED_AT":
            waited = f"Timed out waiting {PATIENCE * 1000:.0f}ms"
            assert any(waited in outcome.output for outcome in outcomes)


@pytest.mark.parametrize("processes", [2, 3])
def test_then_the_same_command_ends_as_if_nothing_had_been(processes, chains):
    chain = chains[processes]
    assert not chain.scales_early
    assert [outcome.code for outcome in (*chain.whole, *chain.outcome)] == [0] * 2 * processes
    (line,) = chain.whole[0].lines("going on after iteration ")
    done = int(re.search(r"iteration (\d+) of", line)[1])
    assert 1 < done < ITERATIONS
    assert len(chain.outcome[0].updates) == 2
    assert chain.whole[0].updates == chain.outcome[0].updates
    found, expected = (
        Scales.load(folder / "gradinit_scales.json") for folder in (chain.folder, chain.unbroken)
    )
    assert len(found.history) == ITERATIONS
    assert found == expected
    with torch.serialization.safe_globals([argparse.Namespace]):
        models = [
            torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"]
            for folder in (chain.folder, chain.unbroken)
        ]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


# ---- one rank is not like the others


def spoiled_copy(data: Path, folder: Path) -> Path:
    """The corpus with tokens that no dictionary has, in sentences as long as they were."""
    shutil.copytree(data, folder)
    tokens = folder / "train.de-en.de.bin"
    kind = np.int32 if tokens.stat().st_size % 4 == 0 else np.uint16
    np.full(tokens.stat().st_size // np.dtype(kind).itemsize, 30000, kind).tofile(tokens)
    return folder


# Of a case: how rank 1 of two differs, and the sentence of both.
OTHERWISE = "process 1 of 2 was started otherwise than process 0: it has "
UNLIKE = {
    "seed": ({"options": ["--seed", "2"]}, f"{OTHERWISE}seed 2, not 1; weights "),
    "iterations": (
        {"options": ["--gradinit-iterations", "9"]},
        f"{OTHERWISE}iterations 9, not {ITERATIONS}: start all of them with the same command",
    ),
    "centering": (
        {"options": ["--gradinit-centering", "off"]},
        f"{OTHERWISE}centering False, not True: ",
    ),
    "batches": (
        {"options": ["--max-tokens", "300"]},
        f"{OTHERWISE}max-tokens 450, not 600; batches ",
    ),
    "data": ({"options": ["--train-subset", "valid"]}, "process 1 of 2: the training data (40 "),
    "model": ({"options": ["--encoder-layers", "2"]}, f"{OTHERWISE}weights "),
    "version": (
        {"harm": {"VERSION": "0.0.9"}},
        f"{OTHERWISE}version 0.0.9, not {fairseq_gradinit.__version__}: ",
    ),
    "no scales file": (
        {"options": ["--gradinit-scales", "/nowhere.json"]},
        "process 1 of 2: cannot read the scales file /nowhere.json: ",
    ),
    "embedding": (
        {"harm": {"SPOILED": "-inf"}},
        "process 1 of 2: parameter encoder.embed_tokens.weight holds NaN or infinity before",
    ),
    "nan loss": (
        {"options": [*OWN_USER_DIR, "--criterion", "nan_loss"]},
        "the loss is nan in GradInit iteration 1, and 11 batches are more than may be skipped",
    ),
}


@pytest.fixture(scope="module")
def unlike(corpus: Corpus, start: Start, tmp_path_factory) -> dict[str, tuple[Path, list[Outcome]]]:
    base = tmp_path_factory.mktemp("unlike")
    runs = [
        Run(
            corpus.translation,
            base / name.replace(" ", "-"),
            harm={1: how.get("harm", {})},
            options={1: how.get("options", ())},
        )
        for name, (how, _) in UNLIKE.items()
    ]
    copy = spoiled_copy(corpus.translation, base / "copy")
    runs.append(Run(corpus.translation, base / "tokens", copies={1: copy}))
    folders = [run.save_dir for run in runs]
    return dict(zip([*UNLIKE, "tokens"], zip(folders, start(*runs), strict=True), strict=True))


@pytest.mark.parametrize("case", UNLIKE)
def test_a_rank_unlike_the_others_is_named_by_all(case, unlike):
    folder, outcomes = unlike[case]
    for outcome in outcomes:
        assert outcome.code == 1
        assert outcome.error().startswith(UNLIKE[case][1])
    assert outcomes[0].error() == outcomes[1].error()
    assert not list(folder.glob("*.json"))


def test_every_rank_skips_what_is_not_finite_in_one(unlike):
    _, outcomes = unlike["nan loss"]
    skipped = [outcome.lines("so the batch is skipped (") for outcome in outcomes]
    assert [len(lines) for lines in skipped] == [11, 11]
    for line in zip(*skipped, strict=True):
        assert len({text.partition("GradInit iteration")[2] for text in line}) == 1


def test_a_rank_whose_data_are_damaged_ends_the_others(unlike):
    """Its own error is torch's."""
    folder, (good, bad) = unlike["tokens"]
    assert bad.code not in (0, None)
    assert "IndexError: index out of range" in bad.output
    assert good.code == 1
    assert "process 0 of 2 lost the others in all_reduce: one of them has ended" in good.error()
    assert not list(folder.glob("*.json"))
