"""Second-order products: two ways to take them, against each other and against the truth."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import loss_of, make_learner, make_model, make_pair
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_gradinit.engine.batch_pairs import BatchPair
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


def test_auto_takes_exact_products_where_differences_are_noise(caplog):
    """A gradient that jumps over and over again within any difference's length."""
    caplog.set_level(logging.INFO)
    model, pair = make_model(), make_pair()

    def loss(tokens):
        total, count = loss_of(model)(tokens)
        sawtooth = (model.out.bias * 1e12).frac().detach() + 1.0
        return total + (sawtooth * model.out.bias).sum() * 100.0, count

    def learner(loss, way) -> ScaleLearner:
        return make_learner(model, loss, gamma=1e-3, second_order=way)

    with deterministic(model):
        smooth, rough = learner(loss_of(model), "auto"), learner(loss, "auto")
        smooth.gradient(pair)
        found = rough.gradient(pair).by_scales
        assert torch.equal(found, learner(loss, "exact").gradient(pair).by_scales)
    assert smooth.learned().second_order == "finite-difference"
    assert "second-order products: finite differences" in caplog.text
    assert rough.learned().second_order == "exact"
    assert "second-order products: exact" in caplog.text


def checkpointed_gradient(reentrant: bool, way: str) -> torch.Tensor:
    """Of a model that is recomputed in the backward pass, in torch's two ways."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    rows = torch.randn(6, 4, dtype=torch.float64)

    def loss(part):
        logits = checkpoint(model, rows[part].requires_grad_(), use_reentrant=reentrant)
        return nn.functional.cross_entropy(logits, part % 3, reduction="sum"), len(part)

    pair = BatchPair([torch.arange(4)], [torch.arange(2, 6)])
    with deterministic(model):
        learner = make_learner(model, loss, norm_gains="fixed", gamma=1e-6, second_order=way)
        return learner.gradient(pair).by_scales


def test_finite_differences_work_with_activation_checkpointing():
    truth = checkpointed_gradient(reentrant=False, way="exact")
    for way in ((False, "finite-difference"), (True, "finite-difference"), (True, "auto")):
        assert relative_error(checkpointed_gradient(*way), truth) < TOLERANCE
    with pytest.raises(GradInitError, match=r"cannot be differentiated twice.*finite-difference"):
        checkpointed_gradient(reentrant=True, way="exact")


@pytest.mark.parametrize("way", ["exact", "finite-difference"])
def test_products_in_bfloat16_are_near_those_in_fp32(way):
    found = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        # Wide enough for the rounding of single weights to bfloat16 to average out.
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, activation="gelu", batch_first=True)
        model = nn.Sequential(nn.Embedding(300, 64), layer, nn.Linear(64, 300))
        tokens = torch.randint(300, (24, 13))
        learner = make_learner(model, gamma=1e-3, second_order=way, precision=precision)
        with deterministic(model):
            pair = BatchPair([tokens[:16]], [tokens[8:]])
            found[precision] = learner.gradient(pair).by_scales
    assert 0.0 < relative_error(found["bf16"], found["fp32"]) < 0.05
