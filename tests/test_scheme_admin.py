"""Admin: omega from measured variances, and the same function without omega."""

from __future__ import annotations

import copy
from itertools import accumulate

import pytest
import torch
from conftest import train_here
from scheme_models import build, outputs
from torch import nn

from fairseq_gradinit.branches import Branch, stacks, variances
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.processes import OneProcess
from fairseq_gradinit.schemes.admin import fill, fold, set_omegas
from fairseq_gradinit.schemes.shortcuts import weights_of


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


def measure(model: nn.Module, set_omega=fill) -> dict[str, list[float]]:
    return set_omegas(model, set_omega, lambda _: outputs(model), [None], OneProcess())


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


def test_folding_omega_into_a_plain_model_is_exact():
    model, plain = loud(build("transformer_admin")), build("transformer_iwslt_de_en")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "shortcuts" not in k})
    before = outputs(plain)
    assert torch.equal(outputs(model), before)
    found = measure(model)
    assert all(max(omegas) > 2.0 for omegas in found.values())
    for stack in stacks(plain):
        for index, omega in enumerate(found[stack.side]):
            fold(stack, index, omega)
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-4, atol=1e-5)
    assert (outputs(plain) - before).abs().max() > 0.1


def test_folding_takes_omegas_that_training_has_moved():
    """Any vector would do that a LayerNorm precedes; here one number for each sublayer."""
    model, plain = loud(build("transformer_admin")), build("transformer_iwslt_de_en")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "shortcuts" not in k})
    for one, other in zip(stacks(model), stacks(plain), strict=True):
        for index in range(1, len(one.branches)):
            fill(one, index, 0.3 + index)
            fold(other, index, 0.3 + index)
    torch.testing.assert_close(outputs(plain), outputs(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"the first omega of the encoder is 2\.0, not 1"):
        fold(stacks(plain)[0], 0, 2.0)


def test_measuring_while_folding_finds_the_same_omegas():
    model, plain = loud(build("transformer_admin")), loud(build("transformer_iwslt_de_en"))
    for side, omegas in measure(model).items():
        assert measure(copy.deepcopy(plain), fold)[side] == pytest.approx(omegas, rel=1e-5)


def test_two_processes_measure_what_one_does():
    model = loud(build("transformer_iwslt_de_en"))
    branch = stacks(model)[1].branches[3]
    rows = [torch.arange(4), torch.arange(4, 8)]

    def evaluate(chosen: torch.Tensor) -> None:
        tokens = 4 + (chosen[:, None] * 7 + torch.arange(7)) % 90
        model(tokens, torch.full((4,), 7), tokens)

    class OneOfTwo(OneProcess):
        """What the other one adds is given."""

        count = 2

        def __init__(self, rank: int, other: torch.Tensor | float = 0.0) -> None:
            self.rank, self.other = rank, other

        def sum_(self, tensors):
            (sums,) = tensors
            self.own = sums.clone()
            sums += self.other

    first = OneOfTwo(0)
    variances([branch], evaluate, rows, first)
    (together,) = variances([branch], evaluate, rows, OneOfTwo(1, first.own))
    (alone,) = variances([branch], evaluate, rows, OneProcess())
    assert together == pytest.approx(alone, rel=1e-12)


def test_training_starts_from_measured_omegas(corpus, tmp_path):
    done = train_here(corpus.translation, tmp_path, "--init-scheme", "admin")
    assert type(done.trainer.get_model()).__name__ == "transformer_admin"
    (line,) = done.lines("omega of the decoder's 3 sublayers")
    logged = [float(word) for word in line.rpartition(": ")[2].split()]
    names = ["self_attn", "encoder_attn", "ffn"]
    first = [done.first[f"decoder.layers.0.shortcuts.{name}"] for name in names]
    for value, omega in zip(logged, first, strict=True):
        assert (omega == omega[0]).all()
        assert omega[0].item() == pytest.approx(value, rel=0.01)
    assert logged == sorted(logged)
    assert logged[0] == 1.0
    assert not torch.equal(done.weights["decoder.layers.0.shortcuts.ffn"], first[2])


def test_the_folded_scheme_starts_as_the_same_function(corpus, tmp_path):
    options = ("--max-update", "1", "--dropout", "0")
    one = train_here(corpus.translation, tmp_path / "a", "--init-scheme", "admin", *options)
    other = train_here(
        corpus.translation, tmp_path / "b", "--init-scheme", "admin-folded", *options
    )
    assert other.code == 0, other.output
    assert type(other.trainer.get_model()).__name__ == "TransformerModel"
    assert one.lines("omega of")[0] == other.lines("omega of")[0]
    loss = [run.updates[0].split()[0] for run in (one, other)]
    assert loss[0] == loss[1]
    assert one.updates != other.updates, "the gradient norms differ"


def test_layer_drop_cannot_be_folded(corpus, tmp_path):
    done = train_here(
        corpus.translation, tmp_path, "--init-scheme", "admin-folded", "--encoder-layerdrop", "0.1"
    )
    assert "which --encoder-layerdrop does not keep" in done.error()


def test_too_few_data_are_answered_with_a_sentence(corpus, tmp_path):
    done = train_here(
        corpus.translation, tmp_path, "--init-scheme", "admin", "--max-tokens", "100000"
    )
    assert done.error().startswith("--init-scheme admin draws sentences by index")


def test_outputs_that_are_not_finite_are_answered_with_a_sentence():
    model = build("transformer_iwslt_de_en")
    nn.init.constant_(model.encoder.layers[0].fc2.bias, torch.inf)
    with pytest.raises(GradInitError, match="branch 2 of the encoder does not put out finite"):
        measure(model, fold)
