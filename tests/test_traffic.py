"""What an iteration gives to the collectives: the formulas of docs/distributed.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import loss_of, make_model, make_pair

from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.centering import center_layer_norms
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learner import ScaleLearner
from fairseq_gradinit.engine.processes import ProcessGroup


@pytest.fixture
def sizes(tmp_path, monkeypatch) -> Iterator[list[int]]:
    """The bytes of each tensor that is reduced, in a group of this process alone."""
    found: list[int] = []
    all_reduce = torch.distributed.all_reduce

    def counting(tensor: torch.Tensor, *args: object) -> None:
        found.append(tensor.numel() * tensor.element_size())
        all_reduce(tensor, *args)

    monkeypatch.setattr(torch.distributed, "all_reduce", counting)
    meeting = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield found
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("second_order", "losses"), [(None, 2), ("finite-difference", 2), ("exact", 1)]
)
def test_an_iteration_moves_the_gradient_once_and_little_else(second_order, losses, sizes):
    model = make_model().float()
    config = GradInitConfig(eta=1e-3)
    if second_order is not None:
        config = GradInitConfig(eta=1e-3, gamma=1e-30, second_order=second_order)
    with deterministic(model):
        blocks = collect_blocks({"": model}, "fixed")
        learner = ScaleLearner(blocks, loss_of(model), config, ProcessGroup())
        learned = sum(block.learned for block in blocks)
        compared = 8 * (2 * learned + 1)
        assert sizes == [compared]
        learner.step(make_pair())
        learner.flush()
    gradient = 4 * sum(block.parameter.numel() for block in blocks)
    assert sorted(sizes[1:]) == sorted([gradient, *[16] * losses, 8 * learned, compared])


def test_centering_moves_a_sum_for_each_layer_norm(sizes):
    model = make_model().float()
    with deterministic(model):
        assert center_layer_norms([model], loss_of(model), make_pair().first, ProcessGroup()) == 1
    # The sum, and whether all processes find it right.
    assert sizes == [8 * (8 + 1), 8]
