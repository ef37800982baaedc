"""MetaInit: the gradient quotient, its derivative by the norms, and its descent."""

from __future__ import annotations

import pytest
import torch
from conftest import train_here
from scheme_models import build
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.processes import OneProcess
from fairseq_gradinit.schemes.metainit import (
    MetaInitConfig,
    move_norms,
    quotient_and_slopes,
)

EPS = 1e-5


def smooth_net(gain: float = 1.0) -> tuple[nn.Module, list[torch.Tensor]]:
    """A small net with three derivatives, in double precision, and two batches of other sizes."""
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 2:
                parameter.mul_(gain)
    return net, [torch.randn(size, 6).double() for size in (16, 8)]


def loss_of(net: nn.Module):
    def loss(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        target = rows.sum(1).long() % 4
        return nn.functional.cross_entropy(net(rows), target, reduction="sum"), len(rows)

    return loss


def quotient(net: nn.Module, rows: torch.Tensor) -> float:
    """Equation 1 of the paper, with the Hessian written out."""
    names, weights = zip(*net.named_parameters(), strict=True)
    flat = torch.cat([w.detach().flatten() for w in weights])
    target = rows.sum(1).long() % 4

    def value(vector: torch.Tensor) -> torch.Tensor:
        parts = torch.split(vector, [w.numel() for w in weights])
        given = {n: p.view_as(w) for n, p, w in zip(names, parts, weights, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(net, given, rows), target)

    g = torch.func.grad(value)(flat)
    product = torch.autograd.functional.hessian(value, flat) @ g
    shift = EPS * torch.where(g >= 0, 1.0, -1.0)
    return ((g - product) / (g + shift) - 1).abs().mean().item()


def test_the_quotient_and_its_derivative_by_the_norms():
    net, (rows, _) = smooth_net()
    found, slopes = quotient_and_slopes(
        list(net.parameters()), loss_of(net), rows, EPS, OneProcess()
    )
    assert found == pytest.approx(quotient(net, rows), rel=1e-9)
    for parameter, slope in zip(net.parameters(), slopes.tolist(), strict=True):
        values = []
        for factor in (1 + 1e-6, 1 - 1e-6):
            before = parameter.detach().clone()
            with torch.no_grad():
                parameter.mul_(factor)
            values.append(quotient(net, rows))
            with torch.no_grad():
                parameter.copy_(before)
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3, abs=1e-5)
    assert slopes.abs().max() > 0.1


def test_the_quotient_falls_and_vectors_keep_their_norms():
    net, (rows, _) = smooth_net(gain=2.0)
    biases = {n: p.clone() for n, p in net.named_parameters() if p.dim() == 1}
    directions = [p / p.norm() for p in net.parameters() if p.dim() == 2]
    config = MetaInitConfig(iterations=60, lr=0.02)
    found = move_norms(list(net.parameters()), loss_of(net), [rows] * 60, config, OneProcess())
    assert len(found) == 60
    assert found[-1] < 0.75 * found[0]
    assert all(torch.equal(dict(net.named_parameters())[n], p) for n, p in biases.items())
    matrices = [p for p in net.parameters() if p.dim() == 2]
    for direction, matrix in zip(directions, matrices, strict=True):
        torch.testing.assert_close(matrix / matrix.norm(), direction)


def test_moves_are_the_signs_of_slopes_with_momentum():
    net, (rows, _) = smooth_net()
    weight = net[3].weight
    config = MetaInitConfig(iterations=2, lr=0.01)
    norms, signs = [weight.norm().item()], []
    for _ in range(2):
        slopes = quotient_and_slopes(list(net.parameters()), loss_of(net), rows, EPS, OneProcess())[
            1
        ]
        signs.append(slopes[4].sign().item())
        move_norms(
            list(net.parameters()),
            loss_of(net),
            [rows],
            MetaInitConfig(iterations=1, lr=0.01),
            OneProcess(),
        )
        norms.append(weight.norm().item())
    assert norms[1] - norms[0] == pytest.approx(-0.01 * signs[0])
    assert norms[2] - norms[1] == pytest.approx(-0.01 * signs[1])
    again, _ = smooth_net()
    move_norms(list(again.parameters()), loss_of(again), [rows] * 2, config, OneProcess())
    moved = again[3].weight.norm().item() - norms[0]
    assert moved == pytest.approx(-0.01 * (1.9 * signs[0] + signs[1]))


def test_a_norm_does_not_pass_through_zero():
    net, (rows, _) = smooth_net(gain=2.0)
    before = [p.detach().clone() for p in net.parameters()]
    config = MetaInitConfig(iterations=1, lr=100.0)
    move_norms(list(net.parameters()), loss_of(net), [rows], config, OneProcess())
    lowest = []
    for old, new in zip(before, net.parameters(), strict=True):
        assert (old * new >= 0).all()
        lowest.append(new.norm().item() == pytest.approx(0.01 * old.norm().item()))
    assert any(lowest)


def test_the_transformer_of_fairseq_has_third_derivatives():
    model = build("transformer_iwslt_de_en")
    tokens = torch.randint(4, 96, (4, 7), generator=torch.Generator().manual_seed(2))

    def loss(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        logits = model(rows, torch.full((4,), 7), rows)[0]
        flat = nn.functional.cross_entropy(logits.flatten(0, 1), rows.flatten(), reduction="sum")
        return flat, rows.numel()

    found, slopes = quotient_and_slopes(list(model.parameters()), loss, tokens, EPS, OneProcess())
    assert found > 0
    assert torch.isfinite(slopes).all()
    used = [name for name, p in model.named_parameters() if p.dim() == 2]
    by_name = dict(zip((n for n, _ in model.named_parameters()), slopes.tolist(), strict=True))
    assert all(by_name[name] for name in used)


def test_a_model_without_higher_derivatives_is_refused():
    net, (rows, _) = smooth_net()

    def loss(batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        # As fairseq's --checkpoint-activations does it.
        outputs = checkpoint(net, batch.clone().requires_grad_(), use_reentrant=True)
        return outputs.square().sum(), len(batch)

    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(GradInitError, match=r"metainit needs third derivatives.*hides its param"):
        move_norms(list(net.parameters()), loss, [rows], MetaInitConfig(), OneProcess())
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_only_norms_of_matrices_change_before_training(corpus, tmp_path):
    options = ("--init-scheme", "metainit", "--init-scheme-iterations", "3")
    done = train_here(corpus.translation, tmp_path, *options)
    assert len(done.lines("metainit: ")) == 3
    for name, before in done.initial.items():
        after = done.first[name]
        if before.dim() == 1:
            assert torch.equal(before, after), name
        else:
            assert not torch.equal(before, after), name
            assert after.norm().item() == pytest.approx(
                before.norm().item(), abs=0.1 * (1 + 1.9 + 2.71) + 1e-4
            )
            torch.testing.assert_close(before / before.norm(), after / after.norm())
