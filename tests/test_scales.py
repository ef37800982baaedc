"""The file of scales: what is written is what comes back, and nothing else comes back at all."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fairseq_gradinit.engine.blocks import base_weights, collect_blocks, set_weights
from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales.file import BlockScale, Scales, kinds_of_blocks, size_changes

HISTORY = (
    Iteration(1, "objective", 5.25, 4.125, 1e3, 0.9, 1.1),
    Iteration(2, "constraint", 5.0, None, 1e4, 0.8, 1.2),
)
SCALES = Scales(
    (
        BlockScale("embed.weight", (5, 2), 1 / 3, "learned"),
        BlockScale("out.weight", (3, 2), math.pi, "learned"),
        BlockScale("out.bias", (3,), 1.0, "zero"),
        BlockScale("norm.weight", (), 1.0, "norm gain"),
    ),
    {"gradinit": "0", "seed": "1"},
    HISTORY,
)

printable = st.text(max_size=20).filter(str.isprintable)
names = printable.filter(bool)
finite = st.floats(allow_nan=False, allow_infinity=False)
block_scales = st.builds(
    BlockScale,
    names,
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.floats(0, 100, allow_nan=False),
    st.sampled_from(["learned", "zero", "norm gain"]),
)
iterations = st.builds(
    Iteration,
    st.integers(1, 999),
    st.sampled_from(["objective", "constraint"]),
    finite,
    st.none() | finite,
    finite,
    finite,
    finite,
)
any_scales = st.builds(
    Scales,
    st.lists(block_scales, min_size=1, max_size=4, unique_by=lambda b: b.name).map(tuple),
    st.dictionaries(printable, printable, max_size=3),
    st.lists(iterations, max_size=3).map(tuple),
)
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture
def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 2), "out": nn.Linear(2, 3)})
    nn.init.zeros_(model["out"].bias)
    return model


def scales_of(model: nn.Module, **factors: float) -> Scales:
    blocks = collect_blocks({"": model}, "fixed")
    return Scales.of(blocks, {b.name: 1.0 for b in blocks} | factors, {"seed": "1"}, HISTORY)


@one_folder
@given(any_scales)
def test_round_trip(tmp_path, scales):
    scales.save(tmp_path / "s.json")
    assert Scales.load(tmp_path / "s.json") == scales


def test_the_file_can_be_read_by_a_person(tmp_path):
    SCALES.save(tmp_path / "s.json")
    text = (tmp_path / "s.json").read_text()
    assert text.isascii()
    document = json.loads(text)
    assert (document["format"], document["version"]) == ("fairseq-gradinit-scales", 2)
    assert document["settings"] == SCALES.settings
    assert document["blocks"][0] == {
        "name": "embed.weight",
        "shape": [5, 2],
        "scale": 1 / 3,
        "state": "learned",
    }
    assert document["history"][1]["kind"] == "constraint"


def test_applying_gives_the_learned_weights_to_the_last_bit(model, tmp_path):
    blocks = collect_blocks({"": model}, "fixed")
    twin = copy.deepcopy(model)
    factors = torch.tensor([1 / 3, math.pi / 3], dtype=torch.float64)
    scales_of(model, **{"embed.weight": 1 / 3, "out.weight": math.pi / 3}).save(tmp_path / "s")
    set_weights(blocks, base_weights(blocks), factors)
    Scales.load(tmp_path / "s").apply(collect_blocks({"": twin}, "fixed"))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"embed": (5, 2)}, "out.weight is not in the model"),
        ({"embed": (5, 2), "out": (2, 3), "more": (2, 3)}, "more.weight is not in the file"),
    ],
)
def test_a_file_of_another_model_is_refused_and_nothing_changes(model, other, message):
    scales = scales_of(model, **{"embed.weight": 2.0})
    made = {name: nn.Linear(*size) for name, size in other.items() if name != "embed"}
    changed = nn.ModuleDict({"embed": nn.Embedding(5, 2), **made})
    before = [p.detach().clone() for p in changed.parameters()]
    with pytest.raises(GradInitError, match=f"learned for another model: .*{message}"):
        scales.apply(collect_blocks({"": changed}, "fixed"))
    assert all(map(torch.equal, before, changed.parameters()))


def test_a_tensor_with_more_dimensions_is_refused(model):
    changed = nn.ModuleDict({"embed": nn.Embedding(5, 2), "out": nn.Conv1d(2, 3, 1)})
    message = (
        r"another model: out.weight has shape \[3, 2\] in the file and \[3, 2, 1\] in the model"
    )
    with pytest.raises(GradInitError, match=message):
        scales_of(model).apply(collect_blocks({"": changed}, "fixed"))


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


def test_a_wholly_different_model_is_refused_in_one_readable_sentence(model):
    other = nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])
    with pytest.raises(GradInitError, match=r"; and 38 more$") as error:
        scales_of(model).apply(collect_blocks({"": other}, "fixed"))
    assert len(str(error.value)) < 400


def changed(**fields):
    document = {
        "format": "fairseq-gradinit-scales",
        "version": 2,
        "settings": {},
        "history": [],
        "blocks": [{"name": "a", "shape": [1], "scale": 1.0, "state": "learned"}],
    }
    return json.dumps(document | fields)


def block(**fields):
    row = {"name": "a", "shape": [1], "scale": 1.0, "state": "learned"} | fields
    return changed(blocks=[row])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON|does not hold"),
        ("9" * 10_000, "is not valid JSON|does not hold"),
        ('{"a": 1}', "does not hold the scales of a run"),
        ("[]", "does not hold the scales of a run"),
        (changed(version=1), "has version 1 .* reads version 2"),
        (changed(blocks=[]), "damaged: a name is missing or repeated"),
        (changed(blocks=json.loads(block())["blocks"] * 2), "a name is missing or repeated"),
        (block(scale=math.nan), r"damaged: blocks\[0\]\.scale: nan is not a finite number"),
        (block(scale=10**400), r"damaged: blocks\[0\]\.scale: "),
        (block(scale=-1), "scale or shape of a is negative"),
        (block(scale="1"), "'1' is not a number"),
        (block(scale=True), "True is not a number"),
        (block(shape="12"), "'12' is not an array"),
        (block(state="frozen"), "'frozen' is none of 'learned'"),
    ],
)
def test_a_file_that_holds_no_scales_is_refused_with_its_name(tmp_path, text, message):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(GradInitError, match=message) as error:
        Scales.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    binary = tmp_path / "model.pt"
    torch.save(torch.ones(3), binary)
    for path in (tmp_path / "missing.json", tmp_path, binary):
        with pytest.raises(GradInitError, match=f"cannot read {path}|{path} is not valid JSON"):
            Scales.load(path)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(GradInitError, match="choose a folder that can be written"):
        SCALES.save(tmp_path / "no" / "s.json")


def test_kinds_leave_out_layer_numbers_only():
    blocks = [
        BlockScale(f"encoder.layers.{i}.{leaf}", (1,), 1.0, "learned")
        for i in range(11)
        for leaf in ("fc1.bias", "k2.weight")
    ]
    kinds = kinds_of_blocks(Scales(tuple(blocks), {}))
    assert {kind: len(rows) for kind, rows in kinds.items()} == {
        "encoder.layers.*.fc1.bias": 11,
        "encoder.layers.*.k2.weight": 11,
    }
