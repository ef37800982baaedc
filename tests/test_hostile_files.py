"""Damaged scales files: refused in a sentence, or read as what stands in them."""

from __future__ import annotations

import json
import random
from dataclasses import asdict

import torch

from fairseq_gradinit.engine.blocks import collect_blocks
from fairseq_gradinit.engine.history import Iteration
from fairseq_gradinit.errors import GradInitError
from fairseq_gradinit.scales.file import Scales

VALUES = (None, True, [], {}, "", "1", "learned", [1, 2], 0, 1, -1, -2.5, 1e39, float("nan"))


def mutate(text: str, rng: random.Random) -> bytes:
    """`text` with a byte changed, a part cut out, or a value of its JSON replaced."""
    content = bytearray(text.encode())
    start, end = sorted(rng.choices(range(len(content)), k=2))
    kind = rng.choice(("bit", "cut", "value", "value"))
    if kind == "bit":
        content[start] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[start:end]
    else:
        document = place = json.loads(text)
        while True:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.1:
                break
            place = place[key]
        place[key] = rng.choice(VALUES)
        return json.dumps(document).encode()
    return bytes(content)


def test_mutants_of_a_scales_file_are_refused_or_mean_what_they_say(tmp_path):
    path = tmp_path / "s.json"
    blocks = collect_blocks({"": torch.nn.Linear(2, 3)}, "learned")
    history = [Iteration(1, "objective", 5.25, 4.125, 1e3, 0.9, 1.1)]
    Scales.of(blocks, {b.name: 0.5 for b in blocks}, {"seed": "1"}, history).save(path)
    text, refusals = path.read_text(), []
    for seed in range(300):
        path.write_bytes(mutate(text, random.Random(seed)))
        try:
            scales = Scales.load(path)
        except GradInitError as refusal:
            refusals.append(str(refusal))
        else:
            stands = json.loads(path.read_text())
            assert json.loads(json.dumps(asdict(scales))).items() <= stands.items()
    assert 150 < len(refusals) < 300
    assert all(str(path) in refusal for refusal in refusals)
