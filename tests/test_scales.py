"""The file of scales: what is written is what comes back, and nothing else comes back at all."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from fairseq_gradinit.engine.blocks import base_weights, collect_blocks, set_weights
from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales.file import BlockScale, Scales, size_changes


@pytest.fixture
def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 2), "out": nn.Linear(2, 3)})
    nn.init.zeros_(model["out"].bias)
    return model


def scales_of(model: nn.Module, **factors: float) -> Scales:
    blocks = collect_blocks({"": model}, "fixed")
    return Scales.of(blocks, {b.name: 1.0 for b in blocks} | factors, {"seed": "1"}, ())


def test_round_trip(tmp_path):
    blocks = BlockScale("a", (), 1 / 3, "learned"), BlockScale("\u00e9\n", (2, 0), 0.0, "norm gain")
    history = (
        Iteration(1, "objective", 1e-300, 0.1 + 0.2, -math.pi, 5e-324, 1.7e308),
        Iteration(2, "constraint", 2.0, None, 3.0, 0.5, 1.0),
    )
    scales = Scales(blocks, {"seed": "1", "": '"'}, history)
    scales.save(tmp_path / "s.json")
    assert Scales.load(tmp_path / "s.json") == scales


def test_the_file_can_be_read_by_a_person(model, tmp_path):
    scales_of(model, **{"embed.weight": 1 / 3}).save(tmp_path / "s.json")
    document = json.loads((tmp_path / "s.json").read_text())
    assert (document["format"], document["version"]) == ("fairseq-gradinit-scales", 2)
    assert document["settings"] == {"seed": "1"}
    first = {"name": "embed.weight", "shape": [5, 2], "scale": 1 / 3, "state": "learned"}
    assert document["blocks"][0] == first


def test_applying_gives_the_learned_weights_to_the_last_bit(model, tmp_path):
    blocks = collect_blocks({"": model}, "fixed")
    twin = copy.deepcopy(model)
    factors = torch.tensor([1 / 3, math.pi / 3], dtype=torch.float64)
    scales_of(model, **{"embed.weight": 1 / 3, "out.weight": math.pi / 3}).save(tmp_path / "s")
    set_weights(blocks, base_weights(blocks), factors)
    Scales.load(tmp_path / "s").apply(collect_blocks({"": twin}, "fixed"))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_file_of_another_model_is_refused_in_one_sentence_and_nothing_changes(model):
    other = nn.ModuleDict({"embed": nn.Embedding(5, 2)})
    other.update({str(i): nn.Linear(2, 2) for i in range(20)})
    before = [p.detach().clone() for p in other.parameters()]
    message = "learned for another model: out.weight is not in the model; .*; and 37 more$"
    with pytest.raises(GradInitError, match=message):
        scales_of(model, **{"embed.weight": 2.0}).apply(collect_blocks({"": other}, "fixed"))
    assert all(map(torch.equal, before, other.parameters()))


def test_scales_serve_a_model_of_other_sizes_and_say_so(model):
    scales = scales_of(model, **{"embed.weight": 2.0, "out.weight": 0.5})
    wider = nn.ModuleDict({"embed": nn.Embedding(7, 4), "out": nn.Linear(4, 3)})
    before = [p.detach().clone() for p in wider.parameters()]
    applied = scales.apply(collect_blocks({"": wider}, "fixed"))
    for factor, old, new in zip((2.0, 0.5, 1.0), before, wider.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), factor * old, rtol=1e-6, atol=0)
    assert [row.shape for row in applied.blocks] == [(7, 4), (3, 4), (3,)]
    assert size_changes(scales, applied) == (
        "embed.weight [5, 2], here [7, 4]; out.weight [3, 2], here [3, 4]"
    )
    assert size_changes(scales, scales.apply(collect_blocks({"": model}, "fixed"))) is None


BLOCK = {"name": "a", "shape": [1], "scale": 1.0, "state": "learned"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "does not hold the scales of a run"),
        ({"version": 1}, "has version 1 .* reads version 2"),
        ({"blocks": [BLOCK | {"scale": math.nan}]}, r"blocks\[0\]\.scale: nan is not a finite num"),
        ({"blocks": [BLOCK | {"shape": "12"}]}, r"blocks\[0\]\.shape: '12' is not an array"),
        ({"blocks": [BLOCK | {"state": "frozen"}]}, "state: 'frozen' is none of 'learned'"),
    ],
)
def test_a_file_that_holds_no_scales_is_refused_with_its_name(tmp_path, change, message):
    path = tmp_path / "s.json"
    document = {"format": "fairseq-gradinit-scales", "version": 2, "settings": {}, "history": []}
    path.write_text(json.dumps({**document, "blocks": [BLOCK], **change}))
    with pytest.raises(GradInitError, match=message) as error:
        Scales.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_cannot_be_read_or_written_is_an_error(model, tmp_path):
    torch.save(torch.ones(3), tmp_path / "model.pt")
    for name, message in (("missing.json", "cannot read"), ("model.pt", "is not valid JSON")):
        with pytest.raises(GradInitError, match=message):
            Scales.load(tmp_path / name)
    with pytest.raises(GradInitError, match="choose a folder that can be written"):
        scales_of(model).save(tmp_path / "no" / "s.json")
