"""The engine on modules of every kind, and on fairseq's own noise."""

from __future__ import annotations

import math

import pytest
import torch
from scheme_models import build, outputs
from tiny import central_differences
from torch import nn

from fairseq_gradinit.engine.batch_pairs import BatchPair
from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learner import ScaleLearner


class Zoo(nn.Module):
    """Convolution, batch norm, packed attention, recurrence, positions and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(8)
        self.positions = nn.Parameter(torch.randn(6, 8) * 0.1)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.group_norm = nn.GroupNorm(2, 8)
        self.recurrence = nn.GRU(8, 8, num_layers=2, dropout=0.5, batch_first=True)
        self.bilinear = nn.Bilinear(8, 8, 4)
        self.dropout = nn.Dropout(0.5)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.attention.out_proj.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.batch_norm(self.conv(x))).mT + self.positions
        x = x + self.dropout(self.attention(x, x, x, need_weights=False)[0])
        x = self.tied(self.group_norm(x.mT).mT)
        last = self.recurrence(x)[0][:, -1]
        return self.bilinear(last, x.mean(1)) * self.temperature


@pytest.fixture
def zoo():
    torch.manual_seed(0)
    model = Zoo().double()
    rows = torch.randn(12, 3, 6, dtype=torch.float64)

    def loss(part: torch.Tensor) -> tuple[torch.Tensor, int]:
        wanted = (part.sum((1, 2)) > 0).long()
        return nn.functional.cross_entropy(model(part), wanted, reduction="sum"), len(part)

    return model, loss, BatchPair([rows[:8]], [rows[4:]])


@pytest.mark.parametrize("gamma", [math.inf, 1e-3], ids=["objective", "constraint"])
@pytest.mark.parametrize("second_order", ["exact", "finite-difference"])
def test_the_scales_of_all_modules_have_the_right_derivative(zoo, gamma, second_order):
    model, loss, pair = zoo
    config = GradInitConfig(
        eta=0.05, target="sgd", gamma=gamma, norm_gains="learned", second_order=second_order
    )

    def gradients() -> list[torch.Tensor]:
        total, count = loss(pair.first[0])
        return list(torch.autograd.grad(total / count, list(model.parameters())))

    def norm() -> torch.Tensor:
        return torch.cat([g.flatten() for g in gradients()]).norm()

    def loss_after_step() -> torch.Tensor:
        with torch.no_grad():
            for p, g in zip(model.parameters(), direction, strict=True):
                p -= config.eta * g
            total, count = loss(pair.second[0])
            for p, g in zip(model.parameters(), direction, strict=True):
                p += config.eta * g
        return total / count / config.eta

    with deterministic(model):
        direction = gradients()
        blocks = collect_blocks({"": model}, "learned")
        assert [block.name for block in blocks] == [name for name, _ in model.named_parameters()]
        learner = ScaleLearner(blocks, loss, config)
        found = learner.gradient(pair)
        truth = central_differences(learner, model, norm if gamma < 1 else loss_after_step)
    assert found.kind == ("constraint" if gamma < 1 else "objective")
    torch.testing.assert_close(found.by_scales, truth, rtol=1e-4, atol=1e-5)


def test_fairseq_s_noise_is_off_inside_and_on_again_afterwards():
    noise = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.4)
    noise |= {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5, "quant_noise_pq": 0.5}
    model = build("transformer_iwslt_de_en", **noise, quant_noise_pq_block_size=8)
    expected = outputs(model)
    model.train()
    with deterministic(model):
        assert torch.equal(outputs(model), expected)
        assert torch.equal(outputs(model), expected)
    assert not torch.equal(outputs(model), outputs(model))
