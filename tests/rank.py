"""One process of several that learn scales together: `torchrun rank.py SCENARIO FOLDER`.

Writes what it comes to as FOLDER/RANK.json. Run without torchrun it is alone with all the data.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Container
from pathlib import Path

import torch
from tiny import SPOILERS
from torch import nn

from fairseq_gradinit.blocks import collect_blocks
from fairseq_gradinit.config import GradInitConfig
from fairseq_gradinit.engine import BatchPair, ScaleLearner, learn_scales
from fairseq_gradinit.errors import GradInitError, GradInitStopped
from fairseq_gradinit.processes import OneProcess, Processes, ProcessGroup
from fairseq_gradinit.quiet import quiet
from fairseq_gradinit.state import StateFile, _digest

SETTINGS = {
    "objective": {"target": "adam"},
    "objective of three steps": {"target": "adam", "trial_steps": 3},
    "constraint, exact": {"target": "sgd", "gamma": 0.5, "second_order": "exact"},
    "constraint, differences": {
        "target": "adam",
        "gamma": 4.0,
        "second_order": "finite-difference",
    },
    "through the step": {"target": "sgd", "through_step": True, "second_order": "exact"},
    "bf16": {"target": "adam", "precision": "bf16"},
}


def model_and_loss(seed: int = 3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))

    def loss(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        target = rows.sum(1).long() % 4
        return nn.functional.cross_entropy(model(rows), target, reduction="sum"), len(rows)

    return model, loss


def draw_pairs(processes: Processes, iterations: int = 4, trial_steps: int = 1) -> list[BatchPair]:
    """Five micro-batches of different sizes for each of S and S~, then iterations of two.

    The third of three processes gets none in these.
    """
    rng = torch.Generator().manual_seed(7)

    def share(sizes: tuple[int, ...]) -> list[torch.Tensor]:
        drawn = [torch.randn(size, 6, generator=rng) for size in sizes]
        return drawn[processes.rank :: processes.count]

    sizes = [(5, 3, 4, 2, 6), *[(3, 4)] * (iterations - 1)]
    return [
        BatchPair(share(size), share(size), [share(size) for _ in range(trial_steps - 1)])
        for size in sizes
    ]


def make_learner(processes: Processes, settings: dict, seed: int = 3) -> ScaleLearner:
    model, loss = model_and_loss(seed)
    config = GradInitConfig(**{"eta": 0.05, "norm_gains": "learned", **settings})
    blocks = collect_blocks({"": model}, config.norm_gains)
    return ScaleLearner(blocks, loss, config, processes, optimizer=torch.optim.Adam)


def learn(processes: Processes, folder: Path) -> dict[str, list]:
    """Scales and history of every kind of run."""
    found = {}
    for name, settings in SETTINGS.items():
        learner = make_learner(processes, settings)
        for pair in draw_pairs(processes, trial_steps=learner.config.trial_steps):
            learner.step(pair)
        learner.flush()
        losses = [(i.loss, i.grad_norm) for i in learner.history]
        found[name] = [learner.scales.tolist(), losses, [i.kind for i in learner.history]]
    return found


def other_weights(processes: Processes, folder: Path) -> object:
    return make_learner(processes, {}, seed=3 + processes.rank)


def other_settings(processes: Processes, folder: Path) -> object:
    learner = make_learner(processes, {"lr": 0.01 * (1 + processes.rank)})
    for pair in draw_pairs(processes):
        learner.step(pair)
    return None


def one_ends(processes: Processes, folder: Path) -> object:
    """The last process ends without a word in the second iteration."""
    learner = make_learner(processes, {})
    for i, pair in enumerate(draw_pairs(processes)):
        if i == 1 and processes.rank == processes.count - 1:
            os._exit(0)
        learner.step(pair)
    return None


def stop_and_go_on(processes: Processes, folder: Path) -> object:
    """The last process alone is asked to stop; then all go on, and only rank 0 has the file.

    At the end they are to go on from one with NaN in it.
    """
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 2 and processes.rank == processes.count - 1

    def whole(path: Path | None, stop=lambda: False) -> object:
        model, loss = model_and_loss()
        config = GradInitConfig(eta=0.05, iterations=4)
        with quiet(model):
            blocks = collect_blocks({"": model}, "fixed")
            state = None if path is None else StateFile(path, processes=processes)
            pairs = draw_pairs(processes)
            return learn_scales(
                blocks, loss, pairs, config, processes=processes, state_file=state, stop=stop
            )

    path = folder / f"state.{processes.rank}"
    try:
        whole(path, stop)
    except GradInitStopped as stopped:
        message = str(stopped)
    found = [message, whole(path).scale_of, whole(None).scale_of, path.exists()]
    if path.exists():
        document = json.loads(path.read_text())
        document["state"]["scales"][0] = math.nan
        body = {name: document[name] for name in ("identity", "state")}
        path.write_text(json.dumps({**document, "digest": _digest(body)}))
    return [*found, whole(path).scale_of]


def not_finite(processes: Processes, folder: Path) -> object:
    """The last process alone meets a loss or a gradient that is not finite, in the first iteration.

    Returns:
        For each such evaluation what was learned, what is learned without that iteration's
        batches, and how many were skipped; for each kind the error when none may be skipped.
    """
    last = processes.rank == processes.count - 1
    pairs = draw_pairs(processes)

    def run(pairs: list[BatchPair], kind: str, spoiled: Container[int], max_skipped: int = 1):
        model, loss_of = model_and_loss()
        calls = itertools.count()

        def loss(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
            value, count = loss_of(rows)
            if next(calls) in spoiled and last:
                value = SPOILERS[kind](value, model[0].bias)
            return value, count

        config = GradInitConfig(eta=0.05, iterations=3, max_skipped=max_skipped)
        with quiet(model):
            blocks = collect_blocks({"": model}, "fixed")
            return learn_scales(blocks, loss, pairs, config, processes=processes)

    expected = run(pairs[1:], "nan", ()).scale_of
    found = []
    for kind in SPOILERS:
        for call in (0, len(pairs[0].first)):
            learned = run(pairs, kind, {call})
            found.append([learned.scale_of, expected, learned.skipped])
        try:
            run(pairs, kind, {0}, max_skipped=0)
        except GradInitError as error:
            found.append(str(error))
    return found


def main() -> None:
    torch.set_num_threads(1)
    scenario, folder = globals()[sys.argv[1]], Path(sys.argv[2])
    processes: Processes = OneProcess()
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        processes = ProcessGroup()
    try:
        found = scenario(processes, folder)
    except GradInitError as error:
        found = str(error)
    else:
        if processes.count > 1:
            torch.distributed.destroy_process_group()
    (folder / f"{processes.rank}.json").write_text(json.dumps(found))
    # After an error, gloo's threads may abort an interpreter that ends in order.
    os._exit(0)


if __name__ == "__main__":
    main()
