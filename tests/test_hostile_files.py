"""Files that someone else made: no scales or state file does more than say what is wrong with it.

A seeded mutator damages a real file of each kind in many ways. Each of these is refused in a
sentence, or gives exactly the values that are in it, checked here against Python's own JSON.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import loss_of, make_model, make_pair
from torch import nn

from fairseq_gradinit.engine.blocks import Block, collect_blocks
from fairseq_gradinit.engine.config import GradInitConfig
from fairseq_gradinit.engine.determinism import deterministic
from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.engine.learner import ScaleLearner, learn_scales
from fairseq_gradinit.engine.state import LearnerState, StateFile, _digest
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales.file import Scales
from fairseq_gradinit.storage import typed_json

# Numbers of mutants of each kind of file, in the fast tier and the slow one.
MUTANTS = pytest.mark.parametrize("mutants", [300, pytest.param(2_000, marks=pytest.mark.slow)])

CONFIG = GradInitConfig(eta=0.05, iterations=4, gamma=36.0, norm_gains="learned", seed=4)
PAIRS = [make_pair(seed) for seed in range(6)]
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def nested(depth: int, kind: str = "[]") -> str:
    inside = '{"a":' if kind == "{}" else "["
    return inside * depth + "1" + kind[1] * depth


VALUES = [
    *("null", "true", "[]", "{}", '""', '"1"', '"learned"', "[1, 2]", '{"a": 1}', "0", "1", "-1"),
    *("-0.0", "1.0", "1.5", "-2.5", "5e-324", "1e38", "1e39", "1e308", "-1e308", "1e400", "NaN"),
    *("Infinity", "-Infinity", "1" + "0" * 400, "9" * 5000, str(2**63), '"\\ud800"', '"\\u0000"'),
    *('"\\u001b[2J"', '"\\u202e"', '"a\\nb"', '"' + "long" * 20_000 + '"', '"no.such.tensor"'),
    *(nested(20), nested(300, "{}"), nested(900), nested(2_000), nested(50_000)),
]
# A value without parts, and what stands before it.
SCALAR = re.compile(r'(?<=[:\[, ])("[^"]*"(?!:)|-?\d[\d.e+-]*|null|true)')
FIELD = re.compile(r'"(\w+)": ("[^"]*"|-?\d[\d.e+-]*|null|\[[^\[\]]*\])(, |(?=\}))')


def mutate(text: str, rng: random.Random) -> bytes:
    """`text` with one or two damages."""
    content = text
    for _ in range(rng.choice((1, 1, 2))):
        content = rng.choice(TEXT_DAMAGES)(content, rng)
    content = content.encode("utf-8", "surrogatepass")
    return rng.choice(BYTE_DAMAGES)(content, rng) if rng.random() < 0.4 else content


def replace_one(pattern: re.Pattern, text: str, rng: random.Random, new: Callable) -> str:
    """`text` with one match of `pattern`, if there is any, replaced by `new` of it."""
    places = list(pattern.finditer(text))
    if not places:
        return text
    place = rng.choice(places)
    return text[: place.start()] + new(place) + text[place.end() :]


def value_changed(text: str, rng: random.Random) -> str:
    return replace_one(SCALAR, text, rng, lambda _: rng.choice(VALUES))


def digit_changed(text: str, rng: random.Random) -> str:
    """What only the digest of a state tells, and nothing in a scales file."""
    return replace_one(re.compile(r"(?<=\.\d)\d"), text, rng, lambda _: str(rng.randrange(10)))


def field_removed(text: str, rng: random.Random) -> str:
    return replace_one(FIELD, text, rng, lambda _: "")


def field_repeated(text: str, rng: random.Random) -> str:
    def twice(place: re.Match) -> str:
        value = rng.choice((place[2], *VALUES))
        return f'"{place[1]}": {value}, {place[0]}'

    return replace_one(FIELD, text, rng, twice)


def field_renamed(text: str, rng: random.Random) -> str:
    name = rng.choice(("", "no_such_field", "a" * 100_000, "\u202e", "\\ud800", "__class__"))
    return replace_one(FIELD, text, rng, lambda p: f'"{name}": {p[2]}{p[3]}')


def array_changed(text: str, rng: random.Random) -> str:
    pattern = re.compile(r"\[[^\[\]]*\]|\{[^{}]*\}")
    return replace_one(pattern, text, rng, lambda _: rng.choice(VALUES))


def element_repeated(text: str, rng: random.Random) -> str:
    return replace_one(re.compile(r"\{[^{}]*\}"), text, rng, lambda p: f"{p[0]}, {p[0]}")


def bits_flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.choices(range(len(content) + 1), k=2))
    return rng.choice((content[:start], content[start:], content[:start] + content[end:]))


def with_bytes(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    more = rng.choice((b"\0", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", rng.randbytes(9), b"[" * 3000))
    return content[:place] + more + content[place:]


def in_another_encoding(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le")))


TEXT_DAMAGES = [
    *(
        value_changed,
        value_changed,
        digit_changed,
        digit_changed,
        field_removed,
        field_repeated,
        field_renamed,
    ),
    *(array_changed, element_repeated),
]
BYTE_DAMAGES = [bits_flipped, cut, with_bytes, in_another_encoding]


def sentence(error: Exception | str) -> str:
    """The message, which must be one that can be read: a line, not long, without control codes."""
    text = str(error)
    assert text.isprintable(), ascii(text)[:500]
    assert 20 < len(text) < 2_000
    return text


def own_reading(content: bytes) -> dict:
    """What stands in a file, by Python's JSON alone; an object must not say a thing twice."""

    def unique(pairs):
        assert len(dict(pairs)) == len(pairs), "a repeated key was believed"
        return dict(pairs)

    return json.loads(content.decode(), object_pairs_hook=unique)


def same(found: object, stands: object) -> bool:
    """Whether a value is what stands in the file, 1 and 1.0 being the same, and True neither."""
    if isinstance(stands, list):
        return len(found) == len(stands) and all(map(same, found, stands))
    return found == stands and isinstance(found, bool) == isinstance(stands, bool)


def same_history(found: tuple[Iteration, ...], stands: list[dict]) -> bool:
    return len(found) == len(stands) and all(
        same(getattr(iteration, name), row[name])
        for iteration, row in zip(found, stands, strict=True)
        for name in Iteration.__dataclass_fields__
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3), nn.LayerNorm(3))


def blocks_of(model: nn.Module) -> list[Block]:
    return collect_blocks({"": model}, "learned")


def real_scales(model: nn.Module) -> str:
    blocks = blocks_of(model)
    factors = {block.name: 0.5 + i / 7 for i, block in enumerate(blocks)}
    history = (
        Iteration(1, "objective", 5.25, 4.125, 1e3, 0.9, 1.1),
        Iteration(2, "constraint", 5.0, None, 1e4, 0.8, 1.2),
    )
    document = {
        "format": "fairseq-gradinit-scales",
        "version": 1,
        "signature": "gradinit:0|seed:1",
        "blocks": [vars(block) for block in Scales.of(blocks, factors, "", ()).blocks],
        "history": [vars(iteration) for iteration in history],
    }
    return json.dumps(document)


def outcome_for_scales(path: Path, content: bytes, model: nn.Module) -> str:
    """What became of a scales file, after everything that must hold was found to hold."""
    path.write_bytes(content)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        scales = Scales.load(path)
    except GradInitError as refusal:
        return "refused" if str(path) in sentence(refusal) else "refused without its name"
    document = own_reading(content)
    assert document["version"] == 1
    assert scales.signature == document["signature"]
    assert same_history(scales.history, document["history"])
    assert [b.name for b in scales.blocks] == [row["name"] for row in document["blocks"]]
    for block, row in zip(scales.blocks, document["blocks"], strict=True):
        assert same(block.scale, row["scale"])
        assert same(block.shape, row["shape"])
        assert block.state == row["state"]
    try:
        scales.apply(blocks_of(model))
    except GradInitError as error:
        sentence(error)
        assert all(map(torch.equal, before, model.parameters()))
        return "not applied"
    factor = {row["name"]: row["scale"] for row in document["blocks"]}
    for (name, p), initial in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p, initial * torch.tensor(factor[name], dtype=p.dtype))
        assert p.isfinite().all()
        p.data.copy_(initial)
    return "applied"


@MUTANTS
def test_mutants_of_a_scales_file_are_refused_or_mean_what_they_say(tmp_path, model, mutants):
    text = real_scales(model)
    met = Counter(
        outcome_for_scales(tmp_path / "s.json", mutate(text, random.Random(seed)), model)
        for seed in range(mutants)
    )
    # Otherwise the mutator would be too gentle, or too rough to reach what lies behind the parser.
    assert met["refused"] > 0.5 * mutants
    assert met["not applied"] > 0
    assert met["applied"] > 0.02 * mutants
    assert met["refused without its name"] == 0


@pytest.fixture(scope="module")
def real_state(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("state") / "state.json"
    run_to_its_end(path, lambda: path.exists())
    return path.read_text()


def run_to_its_end(path: Path, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
    """The scales that a run with this state file learns; None if it was stopped."""
    from fairseq_gradinit.errors import GradInitStopped

    model = make_model()
    try:
        with deterministic(model):
            return learn_scales(
                blocks_of(model),
                loss_of(model),
                PAIRS,
                CONFIG,
                state_file=StateFile(path, interval=2),
                stop=stop,
            ).scale_of
    except GradInitStopped:
        return None


def forged(content: bytes) -> bytes:
    """With a digest that fits, if it is JSON: what one could do who means harm."""
    try:
        document = json.loads(content)
        body = {"identity": document["identity"], "state": document["state"]}
        return json.dumps(document | {"digest": _digest(body)}).encode()
    except (KeyError, TypeError, ValueError, RecursionError):
        return content


def load_state(path: Path, content: bytes, identity: str) -> LearnerState | None:
    path.write_bytes(content)
    return StateFile(path).load(identity)


@MUTANTS
def test_mutants_of_a_state_file_are_refused_or_mean_what_they_say(
    tmp_path, real_state, caplog, mutants
):
    path = tmp_path / "state.json"
    identity = json.loads(real_state)["identity"]
    model = make_model().eval()
    learner = ScaleLearner(blocks_of(model), loss_of(model), CONFIG)
    original = load_state(path, real_state.encode(), identity)
    met: Counter[str] = Counter()
    continued = []
    for seed in range(mutants):
        rng = random.Random(seed)
        content = mutate(real_state, rng)
        if rng.random() < 0.8:
            content = forged(content)
        caplog.clear()
        state = load_state(path, content, identity)
        if state is None:
            (warning,) = caplog.messages
            assert str(path) in sentence(warning)
            assert "so GradInit begins anew" in warning
            met["refused"] += 1
            continue
        row = own_reading(content)["state"]
        assert same(state.scales, row["scales"])
        assert same_history(state.history, row["history"])
        for kind, moments in state.moments.items():
            assert same(
                (moments.step, moments.mean, moments.square), [*row["moments"][kind].values()]
            )
        for name in ("skipped", "second_order", "first_loss", "last_kind"):
            assert same(getattr(state, name), row[name])
        if not learner.fits(state, PAIRS[0]):
            met["not of this run"] += 1
            continue
        met["believed"] += 1
        if state != original:
            continued.append(content)
    assert len(met) == 3
    assert met["refused"] > 0.5 * mutants
    # A state that is believed leads to scales within their bounds, whatever it holds.
    assert continued
    for content in continued[: mutants // 100]:
        path.write_bytes(content)
        scales = run_to_its_end(path)
        assert all(CONFIG.min_scale <= scale <= CONFIG.max_scale for scale in scales.values())


@pytest.mark.parametrize(
    ("change", "unlikely"),
    [
        ({"skipped": 10**12}, "not of this run"),
        ({"skipped": -3}, "not of this run"),
        ({"scales": [1e30]}, "not of one length"),
        ({"scales": []}, "not of one length"),
        ({"scales": [-1.0] * 6}, "not of this run"),
        ({"history": []}, "moments are not those of its iterations"),
        ({"history": {}}, "is not of type list"),
        ({"moments": []}, "is not of type dict"),
        ({"second_order": [[]]}, "second_order is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_state_that_no_run_can_leave_is_refused(change, unlikely, tmp_path, real_state, caplog):
    path = tmp_path / "state.json"
    document = json.loads(real_state)
    document["state"] |= change
    path.write_bytes(forged(json.dumps(document).encode()))
    assert run_to_its_end(path) == run_to_its_end(tmp_path / "fresh.json")
    assert "GradInit begins anew" in caplog.text
    if unlikely != "not of this run":
        assert unlikely in caplog.text


@one_folder
@given(content=st.binary(max_size=300) | st.text(max_size=300).map(lambda t: t.encode()))
@example(content=b"\xef\xbb\xbf{}")
def test_bytes_that_are_no_such_file_are_refused_by_both(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(GradInitError) as error:
        Scales.load(path)
    assert str(path) in sentence(error.value)
    assert StateFile(path).load("identity") is None


@one_folder
@given(scale=st.floats(0, allow_nan=False, allow_infinity=False), place=st.integers(0, 4))
@example(scale=1e39, place=0)
@example(scale=1e300, place=4)
def test_a_scale_that_takes_a_tensor_to_infinity_changes_nothing(scale, place):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3), nn.LayerNorm(3))
    before = [p.detach().clone() for p in model.parameters()]
    names = [block.name for block in blocks_of(model)]
    scales = Scales.of(blocks_of(model), dict.fromkeys(names, 0.5) | {names[place]: scale}, "", ())
    largest = max(float(before[place].abs().max()), 1.0)
    if scale * largest < torch.finfo(torch.float32).max / 2:
        scales.apply(blocks_of(model))
        assert all(p.isfinite().all() for p in model.parameters())
    elif scale > 1e39 * largest:
        with pytest.raises(GradInitError, match=f"makes {names[place]} infinite"):
            scales.apply(blocks_of(model))
        assert all(map(torch.equal, before, model.parameters()))


def test_a_key_that_occurs_twice_is_named(tmp_path, model):
    path = tmp_path / "s.json"
    text = real_scales(model).replace('"scale": ', '"scale": 5.0, "scale": ', 1)
    path.write_text(text)
    with pytest.raises(GradInitError, match=r"the key 'scale' is repeated"):
        Scales.load(path)


def test_quotes_in_a_refusal_are_short_and_shallow(tmp_path):
    """Of records of results too, where a value may be as deep as JSON allows."""
    deep: object = 1
    for _ in range(900):
        deep = [deep]
    for value in (deep, "x" * 10**6, {"\x1b": deep}, 10**4000, math.nan):
        with pytest.raises(ValueError, match=r".") as error:
            typed_json.parse(Iteration, {**dict.fromkeys(Iteration.__dataclass_fields__, value)})
        sentence(f"a sentence about {error.value}")


def test_a_log_takes_any_identity_of_another_run(tmp_path, real_state, caplog, capsys):
    document = json.loads(real_state) | {"identity": "\ud800|\x1b[2J|" + "x" * 10**6}
    path = tmp_path / "state.json"
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        assert load_state(path, forged(json.dumps(document).encode()), "own") is None
    finally:
        logging.getLogger().removeHandler(handler)
    assert "left by another run" in sentence(caplog.messages[-1])
    assert "Logging error" not in capsys.readouterr().err
