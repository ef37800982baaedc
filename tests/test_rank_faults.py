"""Ranks of fairseq-train of which one is killed, stalls, or is not like the others.

Each expects an error of all ranks, and that the same command then goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, OWN_USER_DIR, ROOT, Outcome, usual_options

import fairseq_gradinit
from fairseq_gradinit.scales import FORMAT, VERSION, Scales

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

    def scales(self) -> Scales:
        return Scales.load(self.save_dir / "gradinit_scales.json")

    def weights(self) -> dict[str, torch.Tensor]:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(self.save_dir / "checkpoint_last.pt", weights_only=True)["model"]


Start = Callable[..., list[list[Outcome]]]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start runs side by side, and wait for what each of their ranks comes to."""
    program = str(Path(__file__).with_name("forked_ranks.py"))
    with subprocess.Popen(
        [sys.executable, program],
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL},
        text=True,
        cwd="/",
        env={**os.environ, **ENVIRONMENT},
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
HARM = {
    2: [
        {1: {"KILLED_AT": 4}},
        {0: {"KILLED_AT": 15}},
        {1: {"STOPPED_AT": 17}},
        {1: {"KILLED_AT": 20}},
    ],
    3: [
        {2: {"KILLED_AT": 7}},
        {1: {"KILLED_AT": 21}},
        {0: {"STOPPED_AT": 15}},
        {0: {"KILLED_AT": 21}},
    ],
}


def harmed(run: Run, harm: Mapping[int, Mapping[str, int]]) -> Run:
    """The run in which one rank comes to `harm`; if it stalls, the others wait for PATIENCE."""
    patience = {"PATIENCE": PATIENCE} if "STOPPED_AT" in str(harm) else {}
    ranks = range(run.processes)
    return replace(run, harm={rank: {**patience, **harm.get(rank, {})} for rank in ranks})


def require_errors(harm: Mapping[int, Mapping[str, int]], ranks: Sequence[Outcome]) -> None:
    ((victim, kind),) = harm.items()
    for rank, outcome in enumerate(ranks):
        if rank == victim and "KILLED_AT" in kind:
            assert outcome.code == -signal.SIGKILL
        else:
            # A rank that was stopped goes on when the others have ended, and finds them gone.
            assert outcome.code == 1
            assert f"process {rank} of {len(ranks)} lost the others in all_reduce: " in (
                outcome.error()
            )
    if "STOPPED_AT" in kind:
        waited = f"Timed out waiting {PATIENCE * 1000:.0f}ms"
        assert any(waited in outcome.error() for outcome in ranks)


def test_a_rank_killed_or_stalled_ends_all_and_the_same_command_goes_on(corpus, start, tmp_path):
    """To the scales and the checkpoint of a run that nothing happened to."""
    broken = [Run(corpus.translation, tmp_path / f"broken-{n}", n) for n in HARM]
    for harms in zip(*HARM.values(), strict=True):
        for harm, ranks in zip(harms, start(*map(harmed, broken, harms)), strict=True):
            require_errors(harm, ranks)
        assert not list(tmp_path.glob("*/gradinit_scales.json"))
    unbroken = [Run(corpus.translation, tmp_path / f"unbroken-{n}", n) for n in HARM]
    ended = start(*broken, *unbroken)
    assert [rank.code for ranks in ended for rank in ranks] == [0] * 2 * sum(HARM)
    for i, (run, other) in enumerate(zip(broken, unbroken, strict=True)):
        (line,) = ended[i][0].lines("going on after iteration ")
        assert 1 < int(re.search(r"iteration (\d+) of", line)[1]) < ITERATIONS
        assert len(ended[i][0].updates) == 2
        assert ended[i][0].updates == ended[i + len(HARM)][0].updates
        assert len(run.scales().history) == ITERATIONS
        assert run.scales() == other.scales()
        found, expected = run.weights(), other.weights()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


# ---- one rank is not like the others


def spoiled_copy(data: Path, folder: Path) -> Path:
    """The corpus with tokens that no dictionary has, in sentences as long as they were."""
    shutil.copytree(data, folder)
    tokens = folder / "train.de-en.de.bin"
    kind = np.int32 if tokens.stat().st_size % 4 == 0 else np.uint16
    np.full(tokens.stat().st_size // np.dtype(kind).itemsize, 30000, kind).tofile(tokens)
    return folder


def scales_with_nan(path: Path) -> Path:
    block = {"name": "encoder.embed_tokens.weight", "shape": [88, 32], "scale": math.nan}
    document = {"format": FORMAT, "version": VERSION, "signature": "", "history": []}
    path.write_text(json.dumps({**document, "blocks": [{**block, "state": "learned"}]}))
    return path


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
    "scales": (
        {"options": ["--gradinit-scales", "/nowhere.json"]},
        "process 1 of 2: cannot read the scales file /nowhere.json: ",
    ),
    "embedding": (
        {"harm": {"SPOILED": "-inf"}},
        "process 1 of 2: parameter encoder.embed_tokens.weight holds NaN or infinity before",
    ),
    "loss": (
        {"options": [*OWN_USER_DIR, "--criterion", "nan_loss"]},
        "the loss is nan in GradInit iteration 1, and 11 batches are more than may be skipped",
    ),
}


def test_a_rank_unlike_the_others_is_an_error_of_all(corpus, start, tmp_path):
    data = corpus.translation
    runs = [
        Run(
            data,
            tmp_path / name,
            harm={1: how.get("harm", {})},
            options={1: how.get("options", ())},
        )
        for name, (how, _) in UNLIKE.items()
    ]
    damaged = Run(data, tmp_path / "damaged", copies={1: spoiled_copy(data, tmp_path / "copy")})
    scales = scales_with_nan(tmp_path / "nan.json")
    not_finite = Run(data, tmp_path / "nan", options={1: ["--gradinit-scales", str(scales)]})
    *outcomes, (good, bad), told = start(*runs, damaged, not_finite)
    for (name, (_, sentence)), (one, other) in zip(UNLIKE.items(), outcomes, strict=True):
        assert (one.code, other.code) == (1, 1), name
        assert one.error() == other.error(), name
        assert one.error().startswith(sentence), name
    for rank in told:
        assert (
            f"process 1 of 2: the scales file {scales} is damaged: ValueError: nan" in rank.error()
        )
    # Every rank skips what is not finite in one.
    skipped = [
        re.findall(r"GradInit (iteration 1: the loss is nan, .*)", rank.output)
        for rank in outcomes[list(UNLIKE).index("loss")]
    ]
    assert len(skipped[0]) == 11
    assert skipped[0] == skipped[1]
    # The error of a rank whose data are damaged is torch's.
    assert bad.code not in (0, None)
    assert "IndexError: index out of range" in bad.output
    assert good.code == 1
    assert "process 0 of 2 lost the others in all_reduce: one of them has ended" in good.error()
    assert not list(tmp_path.glob("*/gradinit_*.json"))
