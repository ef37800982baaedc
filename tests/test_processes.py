"""Several processes learn what one process learns on all of their data.

Threads are the processes, except in the slow tests: these start fairseq-train twice, over gloo.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    BIN,
    ENVIRONMENT,
    GRADINIT,
    PLUGIN,
    ROOT,
    Outcome,
    train_here,
    usual_options,
)
from test_train import same, scales_in
from tiny import SPOILERS, in_ranks, loss_of, make_model, make_pair

from fairseq_gradinit.engine.batch_pairs import BatchPair
from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learner import Learned
from fairseq_gradinit.engine.learning import learn_scales
from fairseq_gradinit.engine.processes import OneProcess, Processes
from fairseq_gradinit.engine.state import StateFile
from fairseq_gradinit.errors import GradInitError, GradInitStopped
from fairseq_gradinit.plugin.safe_loading import read_checkpoint
from fairseq_gradinit.scales.file import SCALES_FILE, Scales

# ---- The engine.


PAIRS = [make_pair(seed) for seed in range(5)]


def learn(
    processes: Processes,
    pairs: Sequence[BatchPair] = PAIRS,
    spoil: Callable[..., torch.Tensor] | None = None,
    at: int = 0,
    path: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    seed: int = 3,
    **settings: Any,
) -> Learned:
    """A process's part of the learning; `spoil` spoils the loss of rank 1 in its call `at`."""
    model = make_model(seed)
    calls = itertools.count()

    def loss(tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
        value, count = loss_of(model)(tokens)
        if next(calls) == at and spoil and processes.rank == 1:
            value = spoil(value, model.out.bias)
        return value, count

    share = slice(processes.rank, None, processes.count)
    shares = [BatchPair(pair.first[share], pair.second[share]) for pair in pairs]
    config = GradInitConfig(eta=0.05, iterations=3, **settings)
    state = None if path is None else StateFile(path, processes=processes)
    with deterministic(model):
        blocks = collect_blocks({"": model}, "fixed")
        return learn_scales(
            blocks, loss, shares, config, processes=processes, state_file=state, stop=stop
        )


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"target": "adam"},
        {"target": "sgd", "gamma": 0.1, "second_order": "exact"},
        {"target": "adam", "gamma": 1.0, "second_order": "auto"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_ranks_learn_what_one_process_learns_with_all_micro_batches(ranks, settings):
    """Also from shares of different sizes, and when the third of three ranks has none."""
    rng = torch.Generator().manual_seed(7)
    sizes = [(4, 2, 3, 2, 5), (3, 2), (3, 2)]
    drawn = [[torch.randint(11, (n, 5), generator=rng) for n in size] for size in sizes]
    pairs = [BatchPair(batches, batches[::-1]) for batches in drawn]
    together = in_ranks(ranks, partial(learn, pairs=pairs, **settings))
    alone = learn(OneProcess(), pairs, **settings)
    assert together == [together[0]] * ranks
    # Finite differences magnify rounding.
    precision = 1e-5 if alone.second_order == "finite-difference" else 1e-9
    assert together[0].scale_of == pytest.approx(alone.scale_of, rel=precision)
    kind = "constraint" if "gamma" in settings else "objective"
    for found, expected in zip(together[0].history, alone.history, strict=True):
        assert found.kind == kind
        numbers = [[i.loss, i.trial_loss or 0.0, i.grad_norm] for i in (found, expected)]
        assert numbers[0] == pytest.approx(numbers[1], rel=precision)


def test_other_initial_weights_or_settings_are_an_error():
    with pytest.raises(GradInitError, match=r"different initial weights, first for embed\.weight"):
        in_ranks(2, lambda processes: learn(processes, seed=processes.rank))
    with pytest.raises(GradInitError, match=r"different scales, first for embed\.weight"):
        in_ranks(2, lambda processes: learn(processes, lr=0.01 * (1 + processes.rank)))


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_a_batch_that_is_not_finite_in_one_process_is_skipped_by_all(spoil):
    """And too many are the same error in all."""
    expected = in_ranks(2, partial(learn, pairs=PAIRS[1:]))[0]
    # Rank 1 has one micro-batch of S, and after the trial step one of S~.
    for at in (0, 1):
        found = in_ranks(2, partial(learn, spoil=spoil, at=at, max_skipped=1))
        assert found == [replace(expected, skipped=1)] * 2

    def refused(processes: Processes) -> str:
        with pytest.raises(GradInitError) as raised:
            learn(processes, spoil=spoil, max_skipped=0)
        return str(raised.value)

    (message,) = set(in_ranks(2, refused))
    assert "in GradInit iteration 1, and 1 batches are more than may be skipped" in message


def test_processes_stop_together_and_resume_together(tmp_path):
    """One alone is asked to stop; only rank 0 has the state."""

    def path_of(processes: Processes) -> Path:
        return tmp_path / f"state.{processes.rank}"

    def stopped(processes: Processes) -> str:
        answers = iter([False, processes.rank == 1, False, False])
        with pytest.raises(GradInitStopped) as raised:
            learn(processes, path=path_of(processes), stop=lambda: next(answers))
        return str(raised.value)

    assert in_ranks(2, stopped) == ["GradInit stopped after iteration 2"] * 2
    resumed = in_ranks(2, lambda processes: learn(processes, path=path_of(processes)))
    assert resumed == in_ranks(2, learn)
    assert [file.name for file in tmp_path.iterdir()] == ["state.0"]


# ---- Two ranks of fairseq-train.

ITERATIONS = 7
LEARNING = [
    *GRADINIT,
    *("--gradinit-iterations", str(ITERATIONS), "--gradinit-save-interval", "1"),
    *("--encoder-layers", "1", "--decoder-layers", "1"),
]
FAULTY = ["--user-dir", str(ROOT / "tests" / "faulty_user_dir")]


def train_on_two_ranks(
    data: Path, save_dir: Path, *arguments: object, harm: Mapping[str, str] | None = None
) -> list[Outcome]:
    """fairseq-train as two processes; fairseq itself starts them only where there are GPUs.

    Args:
        harm: what the environment of rank 1 has in addition, see faulty_user_dir. If it is
            stopped, it continues when rank 0 has ended.
    """
    save_dir.mkdir(parents=True, exist_ok=True)
    # A file of an earlier run would mislead them.
    (save_dir / "rendezvous").unlink(missing_ok=True)
    logs = [save_dir / f"log.{rank}" for rank in range(2)]
    with ExitStack() as stack:
        ranks = [
            subprocess.Popen(
                [
                    *(BIN / "fairseq-train", data, *usual_options("--max-update"), *PLUGIN),
                    *(*LEARNING, "--save-dir", save_dir, "--max-update", "2"),
                    *("--distributed-world-size", "2", "--distributed-rank", str(rank)),
                    *("--distributed-init-method", f"file://{save_dir}/rendezvous"),
                    *("--distributed-no-spawn", "--distributed-backend", "gloo"),
                    # Another name of legacy_ddp; pytorch_ddp, also called c10d, needs devices.
                    *("--ddp-backend", "no_c10d", *arguments),
                ],
                **{"stdout": stack.enter_context(log.open("w")), "stderr": subprocess.STDOUT},
                env={**os.environ, **ENVIRONMENT, **((harm or {}) if rank == 1 else {})},
                cwd="/",
            )
            for rank, log in enumerate(logs)
        ]
        try:
            ranks[0].wait(timeout=600)
            deadline = time.monotonic() + 600
            while ranks[1].poll() is None and time.monotonic() < deadline:
                ranks[1].send_signal(signal.SIGCONT)
                time.sleep(0.1)
        finally:
            for rank in ranks:
                rank.kill()
    return [Outcome(rank.wait(), log.read_text()) for rank, log in zip(ranks, logs, strict=True)]


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory) -> tuple[Path, list[Outcome]]:
    """Two ranks that nothing happens to."""
    folder = tmp_path_factory.mktemp("two")
    ranks = train_on_two_ranks(corpus.translation, folder)
    assert [outcome.code for outcome in ranks] == [0, 0], ranks[0].output + ranks[1].output
    return folder, ranks


@pytest.mark.slow
def test_two_ranks_of_fairseq_learn_what_one_learns_with_twice_the_micro_batches(
    corpus, two, tmp_path
):
    folder, ranks = two
    assert len(ranks[0].updates) == 2
    options = [*LEARNING, "--update-freq", "2", "--max-update", "2"]
    one = train_here(corpus.translation, tmp_path, *options, base=usual_options("--max-update"))
    found, expected = (torch.tensor([*scales_in(path).values()]) for path in (folder, tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "|micro-batches:1|processes:2|" in ranks[0].output
    assert "|micro-batches:2|processes:1|" in one.output


@pytest.mark.slow
def test_a_rank_killed_or_stalled_ends_both_and_the_same_command_resumes(corpus, two, tmp_path):
    """To the scales and the checkpoint of a run that nothing happened to.

    Before the iterations there are 6 collectives, or 7 if there is a state; each has 5 more.
    """
    for harm, code in (({"KILLED_AT": "20"}, -signal.SIGKILL), ({"STOPPED_AT": "20"}, 1)):
        good, bad = train_on_two_ranks(corpus.translation, tmp_path, *FAULTY, harm=harm)
        assert (good.code, bad.code) == (1, code), good.output + bad.output
        assert "process 0 of 2 lost the others in all_reduce: " in good.error()
        assert not (tmp_path / SCALES_FILE).exists()
    assert "process 1 of 2 lost the others in all_reduce: " in bad.error()
    assert "Timed out waiting 5000ms" in good.error()
    ended = train_on_two_ranks(corpus.translation, tmp_path)
    assert [rank.code for rank in ended] == [0, 0], ended[0].output + ended[1].output
    (line,) = ended[0].lines("after iteration ")
    assert 3 < int(re.search(r"iteration (\d+) of", line)[1]) < ITERATIONS
    folder, ranks = two
    assert ended[0].updates == ranks[0].updates
    found, expected = (Scales.load(path / SCALES_FILE) for path in (tmp_path, folder))
    assert found == expected
    assert len(found.history) == ITERATIONS
    last = (read_checkpoint(path / "checkpoint_last.pt")["model"] for path in (tmp_path, folder))
    assert same(*last)
