"""Several processes learn what one process learns on all of their data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import GRADINIT, PLUGIN, Outcome, run_command, train_here, usual_options

RANK = Path(__file__).with_name("rank.py")


def run_ranks(scenario: str, processes: int, folder: Path, real: bool = False) -> list:
    """What each of several processes came to, by torchrun and gloo."""
    words = ("--standalone", "--nproc-per-node", processes, RANK, scenario, folder)
    done = run_command("torchrun", *words, real=real)
    files = [folder / f"{rank}.json" for rank in range(processes)]
    assert done.code == 0, done.output
    return [json.loads(file.read_text()) for file in files if file.exists()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("alone")
    done = run_command("python", RANK, "learn", folder)
    assert done.code == 0, done.output
    return json.loads((folder / "0.json").read_text())


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_agree_with_one_on_all_the_data(processes, alone, tmp_path):
    """Also when the shares differ in size, and when the third of three processes has none."""
    together = run_ranks("learn", processes, tmp_path)
    assert all(found == together[0] for found in together)
    assert together[0].keys() == alone.keys()
    for name, (scales, losses, kinds) in together[0].items():
        # Rounding to bfloat16 depends on the rows that are rounded together; finite differences
        # magnify the rounding of fp32 by one over their length.
        tolerance = {"bf16": 1e-2, "constraint, differences": 2e-3}.get(name, 1e-5)
        for found, expected in ((scales, alone[name][0]), (losses, alone[name][1])):
            torch.testing.assert_close(
                torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance
            )
        assert kinds == alone[name][2]
    assert "constraint" in alone["constraint, exact"][2]
    assert "constraint" in alone["constraint, differences"][2]


def test_processes_that_start_apart_are_told_so(tmp_path):
    for message in run_ranks("other_weights", 2, tmp_path, real=True):
        assert "the processes have different initial weights, first for 0.weight" in message


def test_processes_with_other_settings_are_told_so(tmp_path):
    for message in run_ranks("other_settings", 2, tmp_path):
        assert "the processes have different scales, first for 0.weight" in message


def test_a_process_that_ends_stops_the_others_with_a_sentence(tmp_path):
    found = run_ranks("one_ends", 3, tmp_path)
    assert len(found) == 2
    for rank, message in enumerate(found):
        assert f"process {rank} of 3 lost the others in all_reduce: one of them has " in message


@pytest.mark.parametrize("processes", [2, 3])
def test_what_is_not_finite_in_one_process_is_skipped_by_all(processes, tmp_path):
    """A loss or a gradient, at S and after the trial step; too many are the same error in all."""
    together = run_ranks("not_finite", processes, tmp_path)
    assert len(together) == processes
    assert all(found == together[0] for found in together)
    errors = [found for found in together[0] if isinstance(found, str)]
    learned = [found for found in together[0] if not isinstance(found, str)]
    assert len(errors) == 3
    assert len(learned) == 6
    for scales, expected, skipped in learned:
        assert scales == expected
        assert skipped == 1
    for message in errors:
        assert "in GradInit iteration 1, and 1 batches are more than may be skipped" in message


def test_processes_stop_together_and_go_on_together(tmp_path):
    found = run_ranks("stop_and_go_on", 2, tmp_path)
    for rank, (message, resumed, unbroken, has_file, anew) in enumerate(found):
        assert message == "GradInit stopped after iteration 2"
        assert resumed == unbroken == anew
        assert has_file == (rank == 0)


def train_on_two_ranks(
    data: Path, save_dir: Path, *arguments: object, how: Sequence[str] = GRADINIT
) -> list[Outcome]:
    """fairseq-train as two processes; fairseq itself starts them only where there are GPUs."""
    save_dir.mkdir(parents=True, exist_ok=True)
    base = usual_options("--max-update")

    def rank(number: int) -> Outcome:
        return run_command(
            "fairseq-train",
            *(data, *base, *PLUGIN, *how, "--save-dir", save_dir, "--max-update", "2"),
            *("--distributed-world-size", "2", "--distributed-rank", number),
            *("--distributed-init-method", f"file://{save_dir}/rendezvous"),
            *("--distributed-no-spawn", "--distributed-backend", "gloo"),
            # Another name of legacy_ddp; pytorch_ddp, also called c10d, needs devices.
            *("--ddp-backend", "no_c10d", *arguments),
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
