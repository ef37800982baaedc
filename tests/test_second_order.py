"""Second-order products: two ways to take them, against each other and against the truth."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import loss_of, make_learner, make_model, make_pair
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_gradinit.engine.batch_pairs import BatchPair
from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.learner import ScaleLearner
from fairseq_gradinit.errors import GradInitError

# What the two ways may differ by in float64, relative to the largest component.
TOLERANCE = 1e-5


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("target", ["adam", "sgd"])
def test_finite_differences_agree_with_double_backward(target):
    """Which agrees with the truth, see test_engine.py."""
    found = {}
    for way in ("exact", "finite-difference"):
        model = make_model()
        before = [p.detach().clone() for p in model.parameters()]
        with deterministic(model):
            learner = make_learner(model, target=target, gamma=1e-3, second_order=way)
            found[way] = learner.gradient(make_pair()).by_scales
        assert all(map(torch.equal, before, model.parameters()))
    assert relative_error(found["finite-difference"], found["exact"]) < TOLERANCE


def auto(model, pair, loss=None) -> tuple[ScaleLearner, torch.Tensor]:
    config = GradInitConfig(eta=0.05, gamma=1e-3, norm_gains="learned")
    blocks = collect_blocks({"": model}, "learned")
    learner = ScaleLearner(blocks, loss or loss_of(model), config)
    with deterministic(model):
        return learner, learner.gradient(pair).by_scales


def test_auto_takes_exact_products_where_differences_are_noise(caplog):
    """A gradient that jumps over and over again within any difference's length."""
    caplog.set_level(logging.INFO)
    learner, _ = auto(make_model(), make_pair())
    assert learner.learned().second_order == "finite-difference"
    assert "second-order products: finite differences" in caplog.text
    model, pair = make_model(), make_pair()

    def loss(tokens):
        total, count = loss_of(model)(tokens)
        sawtooth = (model.out.bias * 1e12).frac().detach() + 1.0
        return total + (sawtooth * model.out.bias).sum() * 100.0, count

    learner, found = auto(model, pair, loss)
    assert learner.learned().second_order == "exact"
    assert "second-order products: exact" in caplog.text
    with deterministic(model):
        config = GradInitConfig(eta=0.05, gamma=1e-3, norm_gains="learned", second_order="exact")
        exact = ScaleLearner(learner.weights.blocks, loss, config).gradient(pair).by_scales
    assert torch.equal(found, exact)


def checkpointed_gradient(reentrant: bool, way: str) -> torch.Tensor:
    """Of a model that is recomputed in the backward pass, in torch's two ways."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    rows = torch.randn(6, 4, dtype=torch.float64)

    def loss(part):
        logits = checkpoint(model, rows[part].requires_grad_(), use_reentrant=reentrant)
        return nn.functional.cross_entropy(logits, part % 3, reduction="sum"), len(part)

    pair = BatchPair([torch.arange(4)], [torch.arange(2, 6)])
    config = GradInitConfig(eta=0.05, gamma=1e-6, second_order=way)
    with deterministic(model):
        learner = ScaleLearner(collect_blocks({"": model}, "fixed"), loss, config)
        return learner.gradient(pair).by_scales


def test_finite_differences_work_with_activation_checkpointing():
    truth = checkpointed_gradient(reentrant=False, way="exact")
    for way in ((False, "finite-difference"), (True, "finite-difference"), (True, "auto")):
        assert relative_error(checkpointed_gradient(*way), truth) < TOLERANCE
    with pytest.raises(GradInitError, match=r"cannot be differentiated twice.*finite-difference"):
        checkpointed_gradient(reentrant=True, way="exact")


def wide_model_and_loss():
    """Wide enough for the rounding of single weights to bfloat16 to average out."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
    model = nn.Sequential(nn.Embedding(300, 64), layer, nn.Linear(64, 300))
    tokens = torch.randint(300, (24, 13))

    def loss(rows):
        logits = model(tokens[rows, :-1])
        target = tokens[rows, 1:].flatten()
        total = nn.functional.cross_entropy(logits.flatten(0, 1), target, reduction="sum")
        return total, target.numel()

    return model, loss, BatchPair([torch.arange(16)], [torch.arange(8, 24)])


@pytest.mark.parametrize("way", ["exact", "finite-difference"])
def test_products_in_bfloat16_are_near_those_in_fp32(way):
    found = {}
    for precision in ("fp32", "bf16"):
        model, loss, pair = wide_model_and_loss()
        config = GradInitConfig(eta=1e-3, gamma=1e-3, second_order=way, precision=precision)
        with deterministic(model):
            learner = ScaleLearner(collect_blocks({"": model}, "fixed"), loss, config)
            found[precision] = learner.gradient(pair).by_scales
    error = relative_error(found["bf16"], found["fp32"])
    assert 0.0 < error < 0.05
