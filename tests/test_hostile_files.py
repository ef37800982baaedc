"""Files that someone else made: no scales or state file does more than say what is wrong with it.

A seeded mutator damages a real file of each kind in many ways. Each of these is refused in a
sentence, or gives exactly the values that are in it, checked here against Python's own JSON.
"""

from __future__ import annotations

import hashlib
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
from fairseq_gradinit.engine.learner import ScaleLearner
from fairseq_gradinit.engine.learning import learn_scales
from fairseq_gradinit.engine.state import LearnerState, StateFile
from fairseq_gradinit.errors import GradInitError, GradInitStopped
from fairseq_gradinit.scales.file import Scales
from fairseq_gradinit.storage import typed_json

# Numbers of mutants of each kind of file, in the fast tier and the slow one.
MUTANTS = pytest.mark.parametrize("mutants", [300, pytest.param(2_000, marks=pytest.mark.slow)])

CONFIG = GradInitConfig(eta=0.05, iterations=4, gamma=36.0, norm_gains="learned", seed=4)
PAIRS = [make_pair(seed) for seed in range(6)]
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def nested(depth: int, kind: str = "[]") -> str:
    return ('{"a":' if kind == "{}" else "[") * depth + "1" + kind[1] * depth


VALUES = [
    *("null", "true", "[]", "{}", '""', '"1"', '"learned"', "[1, 2]", '{"a": 1}', "0", "1", "-1"),
    *("-0.0", "1.0", "1.5", "-2.5", "5e-324", "1e38", "1e39", "1e308", "-1e308", "1e400", "NaN"),
    *("Infinity", "-Infinity", "1" + "0" * 400, "9" * 5000, str(2**63), '"\\ud800"', '"\\u0000"'),
    *('"\\u001b[2J"', '"\\u202e"', '"a\\nb"', '"' + "long" * 20_000 + '"', '"no.such.tensor"'),
    *(nested(20), nested(300, "{}"), nested(900), nested(2_000), nested(50_000)),
]
NAMES = ("", "no_such_field", "a" * 100_000, "\u202e", "\\ud800", "__class__")
VALUE = r'("[^"]*"|-?\d[\d.e+-]*|null|\[[^\[\]]*\])'
FIELD = rf'"(\w+)": {VALUE}(, |(?=\}}))'
# What is replaced in a text, and by what; most often what only the digest of a state tells.
TEXT_DAMAGES: list[tuple[str, Callable[[re.Match, random.Random], str]]] = [
    *[(r'(?<=[:\[, ])("[^"]*"(?!:)|-?\d[\d.e+-]*|null|true)', lambda m, r: r.choice(VALUES))] * 2,
    *[(r"(?<=\.\d)\d", lambda m, r: str(r.randrange(10)))] * 2,
    (FIELD, lambda m, r: ""),
    (FIELD, lambda m, r: f'"{m[1]}": {r.choice((m[2], *VALUES))}, {m[0]}'),
    (FIELD, lambda m, r: f'"{r.choice(NAMES)}": {m[2]}{m[3]}'),
    (r"\[[^\[\]]*\]|\{[^{}]*\}", lambda m, r: r.choice(VALUES)),
    (r"\{[^{}]*\}", lambda m, r: f"{m[0]}, {m[0]}"),
]
BYTES = (b"\0", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"[" * 3000)
ENCODINGS = ("utf-16", "utf-32", "utf-8-sig", "utf-16-le")


def mutate(text: str, rng: random.Random) -> bytes:
    """`text` with one or two damages, and at times the bytes of it cut, changed or recoded."""
    for _ in range(rng.choice((1, 1, 2))):
        pattern, new = rng.choice(TEXT_DAMAGES)
        places = list(re.finditer(pattern, text))
        if places:
            place = rng.choice(places)
            text = text[: place.start()] + new(place, rng) + text[place.end() :]
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    kind = rng.choice(("bit", "cut", "more", "encoding")) if rng.random() < 0.4 else ""
    start, end = sorted(rng.choices(range(len(content)), k=2))
    if kind == "bit":
        content[start] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = rng.choice((content[:start], content[start:], content[:start] + content[end:]))
    elif kind == "more":
        content[start:start] = rng.choice((*BYTES, rng.randbytes(9)))
    elif kind == "encoding":
        return content.decode("utf-8", "replace").encode(rng.choice(ENCODINGS))
    return bytes(content)


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
    if isinstance(stands, dict):
        found = found if isinstance(found, dict) else vars(found)
        return all(same(value, stands[name]) for name, value in found.items())
    return found == stands and isinstance(found, bool) == isinstance(stands, bool)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3), nn.LayerNorm(3))


def blocks_of(model: nn.Module) -> list[Block]:
    return collect_blocks({"": model}, "learned")


def real_scales() -> Scales:
    blocks = blocks_of(make_net())
    factors = {block.name: 0.5 + i / 7 for i, block in enumerate(blocks)}
    history = (
        Iteration(1, "objective", 5.25, 4.125, 1e3, 0.9, 1.1),
        Iteration(2, "constraint", 5.0, None, 1e4, 0.8, 1.2),
    )
    return Scales.of(blocks, factors, {"gradinit": "0", "seed": "1"}, history)


def outcome_for_scales(path: Path, content: bytes) -> str:
    """What became of a scales file, after everything that must hold was found to hold."""
    path.write_bytes(content)
    try:
        scales = Scales.load(path)
    except GradInitError as refusal:
        return "refused" if str(path) in sentence(refusal) else "refused without its name"
    document = own_reading(content)
    assert document["version"] == 2
    assert scales.settings == document["settings"]
    assert same(scales.history, document["history"])
    assert same(scales.blocks, document["blocks"])
    model, initial = make_net(), make_net()
    try:
        scales.apply(blocks_of(model))
    except GradInitError as error:
        sentence(error)
        assert all(map(torch.equal, initial.parameters(), model.parameters()))
        return "not applied"
    factor = {row["name"]: row["scale"] for row in document["blocks"]}
    for (name, p), was in zip(model.named_parameters(), initial.parameters(), strict=True):
        assert torch.equal(p, was * torch.tensor(factor[name], dtype=p.dtype))
        assert p.isfinite().all()
    return "applied"


@MUTANTS
def test_mutants_of_a_scales_file_are_refused_or_mean_what_they_say(tmp_path, mutants):
    path = tmp_path / "s.json"
    real_scales().save(path)
    text = path.read_text()
    found = (outcome_for_scales(path, mutate(text, random.Random(i))) for i in range(mutants))
    met = Counter(found)
    # Otherwise the mutator would be too gentle, or too rough to reach what lies behind the parser.
    assert met["refused"] > 0.5 * mutants
    assert met["not applied"] > 0
    assert met["applied"] > 0.02 * mutants
    assert len(met) == 3


def run_to_its_end(path: Path, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """The scales that a run with this state file learns."""
    model, state = make_model(), StateFile(path, interval=2)
    with deterministic(model):
        learned = learn_scales(
            blocks_of(model), loss_of(model), PAIRS, CONFIG, state_file=state, stop=stop
        )
    return learned.scale_of


@pytest.fixture(scope="module")
def real_state(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("state") / "state.json"
    with pytest.raises(GradInitStopped):
        run_to_its_end(path, path.exists)
    return path.read_text()


def forged(content: bytes) -> bytes:
    """With a digest that fits, if it is JSON: what one could do who means harm."""
    try:
        document = json.loads(content)
        text = json.dumps([document["identity"], document["state"]], sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return json.dumps(document | {"digest": digest}).encode()
    except (KeyError, TypeError, ValueError, RecursionError):
        return content


def load_state(path: Path, content: bytes, identity: dict[str, str]) -> LearnerState | None:
    path.write_bytes(content)
    return StateFile(path, identity).load()


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
            met["refused"] += 1
            continue
        assert same(state, own_reading(content)["state"])
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
        ({"skipped": 10**12}, ""),
        ({"skipped": -3}, ""),
        ({"scales": [1e30]}, "not of one length"),
        ({"scales": [-1.0] * 6}, ""),
        ({"history": []}, "moments are not those of its iterations"),
        ({"history": {}}, "is not an array"),
        ({"second_order": [[]]}, "second_order: "),
    ],
    ids=str,
)
def test_a_state_that_no_run_can_leave_is_refused(change, unlikely, tmp_path, real_state, caplog):
    path = tmp_path / "state.json"
    document = json.loads(real_state)
    document["state"] |= change
    path.write_bytes(forged(json.dumps(document).encode()))
    assert run_to_its_end(path) == run_to_its_end(tmp_path / "fresh.json")
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert unlikely in warning


@one_folder
@given(content=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
@example(content=b"\xef\xbb\xbf{}")
def test_bytes_that_are_no_such_file_are_refused_by_both(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(GradInitError) as error:
        Scales.load(path)
    assert str(path) in sentence(error.value)
    assert StateFile(path).load() is None


@one_folder
@given(scale=st.floats(0, allow_nan=False, allow_infinity=False), place=st.integers(0, 4))
@example(scale=1e39, place=0)
@example(scale=1e300, place=4)
def test_a_scale_that_takes_a_tensor_to_infinity_changes_nothing(scale, place):
    model, before = make_net(), list(make_net().parameters())
    blocks = blocks_of(model)
    name = blocks[place].name
    scales = Scales.of(blocks, {block.name: 0.5 for block in blocks} | {name: scale}, {}, ())
    largest = max(float(before[place].abs().max()), 1.0)
    if scale * largest < torch.finfo(torch.float32).max / 2:
        scales.apply(blocks)
        assert all(p.isfinite().all() for p in model.parameters())
    elif scale > 1e39 * largest:
        with pytest.raises(GradInitError, match=f"makes {name} infinite"):
            scales.apply(blocks)
        assert all(map(torch.equal, before, model.parameters()))


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
    document = json.loads(real_state) | {
        "identity": {"\ud800": "\x1b[2J", "x" * 10**6: "x" * 10**6}
    }
    path = tmp_path / "state.json"
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        assert load_state(path, forged(json.dumps(document).encode()), {"own": "1"}) is None
    finally:
        logging.getLogger().removeHandler(handler)
    assert "is of another run" in sentence(caplog.messages[-1])
    assert "Logging error" not in capsys.readouterr().err
