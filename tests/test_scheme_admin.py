"""Admin: omega from measured variances."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from conftest import train_here
from scheme_models import build, outputs
from tiny import in_ranks
from torch import nn

from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.processes import OneProcess, Processes
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.plugin.branches import Branch, stacks, variances
from fairseq_gradinit.plugin.schemes.admin import set_omegas
from fairseq_gradinit.plugin.schemes.shortcuts import weights_of


def loud(model: nn.Module, size: float = 2.0) -> nn.Module:
    """Branches of a size that matters, different in every layer."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for stack in stacks(model):
            for branch in stack.branches:
                for linear in branch.values:
                    nn.init.xavier_normal_(linear.weight, generator=rng)
                    linear.weight.mul_(size * (0.5 + torch.rand((), generator=rng)))
    return model


def measure(model: nn.Module) -> dict[str, list[float]]:
    return set_omegas(model, lambda _: outputs(model), [None], OneProcess())


def spread(model: nn.Module, branch: Branch) -> tuple[float, float]:
    (found,) = variances([branch], lambda _: outputs(model), [None], OneProcess())
    return found


def dependencies(model: nn.Module) -> list[list[float]]:
    """For every sublayer, its branch's part of the variance of its shortcut and its branch."""
    shares = []
    for stack in stacks(model):
        parts = [spread(model, branch) for branch in stack.branches]
        omegas = [weights_of(b.layer)[b.name].mean().item() for b in stack.branches]
        shares.append([f / (w**2 * x + f) for w, (x, f) in zip(omegas, parts, strict=True)])
    return shares


def test_variances_are_those_of_what_is_added():
    model = loud(build("transformer_iwslt_de_en"))
    seen = {}
    layer = model.decoder.layers[1]
    layer.fc2.register_forward_hook(lambda _, __, output: seen.update(fc2=output))
    layer.encoder_attn.register_forward_hook(lambda _, __, output: seen.update(cross=output[0]))
    layer.fc1.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    branches = {b.name: b for b in stacks(model)[1].branches if b.layer is layer}
    x, output = spread(model, branches["ffn"])
    assert x == pytest.approx(seen["x"].var(unbiased=False).item(), rel=1e-5)
    assert output == pytest.approx(seen["fc2"].var(unbiased=False).item(), rel=1e-5)
    _, output = spread(model, branches["encoder_attn"])
    assert output == pytest.approx(seen["cross"].var(unbiased=False).item(), rel=1e-5)
    assert "residual_connection" not in vars(layer)


def test_omegas_add_up_the_variances_of_what_came_before():
    model = loud(build("transformer_admin"))
    found = measure(model)
    for stack in stacks(model):
        parts = [spread(model, branch) for branch in stack.branches]
        totals = list(accumulate([parts[0][0], *(output for _, output in parts)]))
        expected = [1.0, *(total**0.5 for total in totals[1:-1])]
        assert found[stack.side] == pytest.approx(expected, rel=1e-5)
        stored = [weights_of(b.layer)[b.name].tolist() for b in stack.branches]
        assert stored == [[pytest.approx(omega)] * 32 for omega in expected]


def test_the_dependency_on_a_branch_falls_with_depth_as_in_pre_ln():
    model = loud(build("transformer_admin", encoder_layers=6, decoder_layers=6), size=1.4)
    before = dependencies(model)
    measure(model)
    after = dependencies(model)
    for old, new in zip(before, after, strict=True):
        count = len(new)
        assert sum(new[-6:]) / 6 < 2.0 / (count - 3)
        assert sum(old[-6:]) / 6 > 3.0 / (count - 3)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_measure_what_one_process_does(ranks):
    """Also when the ranks have shares of different sizes."""

    def work(processes: Processes) -> tuple[dict[str, list[float]], set[int]]:
        model, seen = loud(build("transformer_admin")), set()

        def evaluate(row: int) -> None:
            seen.add(row)
            tokens = 4 + (row * 7 + torch.arange(7)[None]) % 90
            model(tokens, torch.full((1,), 7), tokens)

        with deterministic(model):
            return set_omegas(model, evaluate, range(5), processes), seen

    together, shares = zip(*in_ranks(ranks, work), strict=True)
    assert sorted(row for share in shares for row in share) == list(range(5))
    assert all(found == together[0] for found in together)
    for side, omegas in work(OneProcess())[0].items():
        assert together[0][side] == pytest.approx(omegas, rel=1e-6)


def test_too_few_data_are_refused(corpus, tmp_path):
    done = train_here(
        corpus.translation, tmp_path, "--init-scheme", "admin", "--max-tokens", "100000"
    )
    assert done.error().startswith("--init-scheme admin draws sentences by index")


def test_outputs_that_are_not_finite_are_refused():
    model = build("transformer_admin")
    nn.init.constant_(model.encoder.layers[0].fc2.bias, torch.inf)
    with pytest.raises(GradInitError, match="branch 2 of the encoder does not put out finite"):
        measure(model)
