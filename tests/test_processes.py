"""Several processes learn what one process learns on all of their data."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import GRADINIT, PLUGIN, Outcome, run_command, train_here, usual_options
from torch import multiprocessing, nn

from fairseq_gradinit.blocks import collect_blocks
from fairseq_gradinit.config import GradInitConfig
from fairseq_gradinit.engine import BatchPair, ScaleLearner
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.processes import ProcessGroup
from fairseq_gradinit.quiet import quiet


def model_and_loss(seed: int = 3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))

    def loss(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        target = rows.sum(1).long() % 4
        return nn.functional.cross_entropy(model(rows), target, reduction="sum"), len(rows)

    return model, loss


def draw_pairs() -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Five micro-batches of different sizes for each of S and S~, then iterations of two."""
    rng = torch.Generator().manual_seed(7)
    return [
        tuple([torch.randn(size, 6, generator=rng) for size in sizes] for _ in range(2))
        for sizes in [[1, 4, 2, 5, 3]] * 6 + [[4, 2]] * 6
    ]


def learn(settings: dict, rank: int = 0, processes: int = 1, seed: int = 3) -> list[list[float]]:
    """The scales after every iteration, from this rank's share of the micro-batches."""
    model, loss = model_and_loss(seed)
    config = GradInitConfig(**{"eta": 0.05, "norm_gains": "learned", **settings})
    with quiet(model):
        learner = ScaleLearner(
            collect_blocks({"": model}, config.norm_gains),
            loss,
            config,
            ProcessGroup() if processes > 1 else None,
        )
        found = []
        for first, second in draw_pairs():
            pair = BatchPair(first[rank::processes], second[rank::processes])
            iteration = learner.step(pair)
            found.append([*learner.scales.tolist(), iteration.loss, iteration.grad_norm])
        return found


def worker(rank: int, processes: int, folder: str, settings: list[dict], seeds: list[int]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    try:
        found: object = learn(settings[rank], rank, processes, seeds[rank])
    except GradInitError as error:
        found = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def learn_together(processes: int, folder: Path, settings: list[dict], seeds: list[int]) -> list:
    multiprocessing.spawn(worker, (processes, str(folder), settings, seeds), processes)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [{"target": "adam"}, {"target": "sgd", "gamma": 0.5}],
    ids=["objective", "constraint"],
)
def test_processes_agree_with_one_on_all_the_data(processes, settings, tmp_path):
    """Also when the shares differ in size, and when the third of three processes has none."""
    together = learn_together(processes, tmp_path, [settings] * processes, [3] * processes)
    assert all(found == together[0] for found in together)
    alone = torch.tensor(learn(settings), dtype=torch.float64)
    torch.testing.assert_close(
        torch.tensor(together[0], dtype=torch.float64), alone, rtol=1e-5, atol=1e-5
    )


def test_processes_that_start_apart_are_told_so(tmp_path):
    for message in learn_together(2, tmp_path, [{}, {}], [3, 4]):
        assert "the processes have different initial weights, first for 0.weight" in message


def test_processes_with_other_settings_are_told_so(tmp_path):
    for message in learn_together(2, tmp_path, [{"lr": 0.01}, {"lr": 0.02}], [3, 3]):
        assert "the processes have different scales, first for 0.weight" in message


def train_on_two_ranks(data: Path, save_dir: Path, *arguments: object) -> list[Outcome]:
    """fairseq-train as two processes; fairseq itself starts them only where there are GPUs."""
    save_dir.mkdir(parents=True, exist_ok=True)
    base = usual_options("--max-update")

    def rank(number: int) -> Outcome:
        return run_command(
            "fairseq-train",
            *(data, *base, *PLUGIN, *GRADINIT, "--save-dir", save_dir, "--max-update", "2"),
            *("--distributed-world-size", "2", "--distributed-rank", number),
            *("--distributed-init-method", f"file://{save_dir}/rendezvous"),
            *("--distributed-no-spawn", "--distributed-backend", "gloo"),
            *("--ddp-backend", "legacy_ddp", *arguments),
        )

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


def read_scales(save_dir: Path) -> torch.Tensor:
    document = json.loads((save_dir / "gradinit_scales.json").read_text())
    return torch.tensor([block["scale"] for block in document["blocks"]], dtype=torch.float64)


def test_two_ranks_of_fairseq_learn_what_one_learns_with_twice_the_micro_batches(corpus, tmp_path):
    two = train_on_two_ranks(corpus.translation, tmp_path / "two")
    assert [outcome.code for outcome in two] == [0, 0], two[0].output + two[1].output
    assert len(two[0].updates) == 2
    one = train_here(
        corpus.translation,
        *(tmp_path / "one", *GRADINIT, "--update-freq", "2", "--max-update", "2"),
    )
    assert one.code == 0, one.output
    torch.testing.assert_close(
        read_scales(tmp_path / "two"), read_scales(tmp_path / "one"), rtol=1e-4, atol=1e-4
    )
    assert "|micro-batches:1|processes:2|" in two[0].output
    assert "|micro-batches:2|processes:1|" in one.output


def test_a_mistake_on_two_ranks_is_one_sentence_of_each(corpus, tmp_path):
    for outcome in train_on_two_ranks(
        corpus.translation, tmp_path, "--gradinit-max-tokens", "100000"
    ):
        assert "(400 sentences) fill only 1 GradInit batch(es)" in outcome.error()
