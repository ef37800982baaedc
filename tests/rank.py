"""What several processes learn together; as a program one of them: `torchrun rank.py FOLDER`.

It writes what it learns as FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from fairseq_gradinit.engine.batch_pairs import BatchPair
from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.learner import ScaleLearner
from fairseq_gradinit.engine.processes import Processes, ProcessGroup

SETTINGS = {
    "objective": {"target": "adam"},
    "constraint, exact": {"target": "sgd", "gamma": 0.5, "second_order": "exact"},
    "constraint, differences": {
        "target": "adam",
        "gamma": 4.0,
        "second_order": "finite-difference",
    },
    "bf16": {"target": "adam", "precision": "bf16"},
}


def model_and_loss(seed: int = 3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))

    def loss(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        target = rows.sum(1).long() % 4
        return nn.functional.cross_entropy(model(rows), target, reduction="sum"), len(rows)

    return model, loss


def draw_pairs(processes: Processes, iterations: int = 4) -> list[BatchPair]:
    """Five micro-batches of different sizes for each of S and S~, then iterations of two.

    The third of three processes gets none in these.
    """
    rng = torch.Generator().manual_seed(7)

    def share(sizes: tuple[int, ...]) -> list[torch.Tensor]:
        drawn = [torch.randn(size, 6, generator=rng) for size in sizes]
        return drawn[processes.rank :: processes.count]

    sizes = [(5, 3, 4, 2, 6), *[(3, 4)] * (iterations - 1)]
    return [BatchPair(share(size), share(size)) for size in sizes]


def make_learner(processes: Processes, settings: dict, seed: int = 3) -> ScaleLearner:
    model, loss = model_and_loss(seed)
    config = GradInitConfig(**{"eta": 0.05, "norm_gains": "learned", **settings})
    blocks = collect_blocks({"": model}, config.norm_gains)
    return ScaleLearner(blocks, loss, config, processes)


def learn(processes: Processes) -> dict[str, list]:
    """Scales and history of every kind of run."""
    found = {}
    for name, settings in SETTINGS.items():
        learner = make_learner(processes, settings)
        for pair in draw_pairs(processes):
            learner.step(pair)
        learner.flush()
        state = learner.state()
        losses = [(i.loss, i.grad_norm) for i in state.history]
        found[name] = [list(state.scales), losses, [i.kind for i in state.history]]
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    processes = ProcessGroup()
    found = learn(processes)
    torch.distributed.destroy_process_group()
    (Path(sys.argv[1]) / f"{processes.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
